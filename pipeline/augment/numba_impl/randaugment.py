"""RandAugment on 8-bit images, compiled by Numba.

The PyTorch modules `tables`, `blend` and `geometry` define the operations. These functions produce exactly the same
bytes: the same arithmetic in the same order and precision, without fused multiply-add. They process one sample after
the other, so that the data stays in the CPU's cache. An image is uint8 [height * width * 3] here.

Everything is in one file because Numba compiles a cached function again only if the file that contains it changes.
"""

from __future__ import annotations

import numpy as np

from pipeline.augment.numba_impl.compiler import cached, compiled
from pipeline.augment.ops import Op
from pipeline.augment.torch_impl import blend, tables

F = np.float32
LEVELS = tables.LEVELS
RED, GREEN, BLUE = tables.LUMA
LUMA_HALF, LUMA_BITS = tables.LUMA_HALF, tables.LUMA_BITS
MIDDLE, HALF_WEIGHT, INVERSE_WEIGHT = blend.MIDDLE, F(blend.WEIGHTS / 2), F(1 / blend.WEIGHTS)
AUTO_CONTRAST, EQUALIZE, CONTRAST = int(Op.AUTO_CONTRAST), int(Op.EQUALIZE), int(Op.CONTRAST)
COLOR, SHARPNESS, ROTATE = int(Op.COLOR), int(Op.SHARPNESS), int(Op.ROTATE)
SHEAR_X, TRANSLATE_X = int(Op.SHEAR_X), int(Op.TRANSLATE_X)
SHEAR_Y, TRANSLATE_Y = int(Op.SHEAR_Y), int(Op.TRANSLATE_Y)
BORDER = 2  # pixels around the padded image, so that the 4 x 4 neighbors of every sampled point exist
BLOCK = 64  # pixels that are resampled together, whose neighbors fit into the L1 cache


@cached
def apply_ops(images, flips, first, ops, factors, maps, host_tables, fill, height, width, scratch, out):
    """Apply flips and RandAugment to n samples.

    Args:
        images: uint8 [n, height * width * 3].
        flips: bool [n]: whether a sample is flipped, before its operations.
        first: int64 [n + 1]: the operations of sample i are those from first[i] to first[i + 1].
        ops: int64 [operations].
        factors: float32 [operations]: factors of the operations that blend.
        maps: float64 [operations, 6]: affine maps of the geometric operations.
        host_tables: uint8 [operations, 256]: tables of the operations whose table does not depend on the image.
        fill: uint8 [3]: color of the areas that geometric operations leave uncovered.
        scratch: uint8 [scratch_bytes(height, width)], aligned to 4 bytes.
        out: uint8, like `images`.
    """
    split = len(scratch) - images.shape[1]
    padded, other = scratch[:split], scratch[split:]
    for row in range(len(images)):
        image, start, stop = images[row], first[row], first[row + 1]
        if flips[row]:
            target = other if (stop - start) % 2 else out[row]
            _flip(image, height, width, target)
            image = target
        for i in range(start, stop):
            # Alternate between both memories, so that the last operation writes to `out`.
            target = other if (stop - i - 1) % 2 else out[row]
            op = ops[i]
            if op == COLOR:
                _color(image, factors[i], target)
            elif op == SHARPNESS:
                _sharpness(image, factors[i], height, width, target)
            elif op in (ROTATE, SHEAR_X, TRANSLATE_X, SHEAR_Y, TRANSLATE_Y):
                along_x, along_y = op not in (SHEAR_Y, TRANSLATE_Y), op not in (SHEAR_X, TRANSLATE_X)
                _resample(image, maps[i], along_x, along_y, fill, height, width, padded, target)
            else:
                _look_up(image, _table(image, op, factors[i], host_tables[i]), target)
            image = target
        if start == stop and not flips[row]:
            _copy(image, out[row])


def scratch_bytes(height: int, width: int) -> int:
    """Return the size of the memory for a padded and an intermediate image."""
    return (height + 2 * BORDER) * (width + 2 * BORDER) * 4 + height * width * 3


@compiled
def _copy(values, out):  # compiles much faster than an assignment of arrays
    for i in range(len(values)):
        out[i] = values[i]


@compiled
def _flip(image, height, width, out):
    for y in range(height):
        row, to = image[y * width * 3 : (y + 1) * width * 3], out[y * width * 3 : (y + 1) * width * 3]
        for x in range(width):
            for channel in range(3):
                to[3 * x + channel] = row[3 * (width - 1 - x) + channel]


@compiled
def _byte(value):
    """Clip to 0 to 255 and truncate to uint8."""
    return np.uint8(min(max(value, F(0)), F(255)))


@compiled
def _luma(red, green, blue):
    return (red * RED + green * GREEN + blue * BLUE + LUMA_HALF) >> LUMA_BITS


@compiled
def _look_up(image, table, out):
    for pixel in range(len(image) // 3):
        for channel in range(3):
            out[3 * pixel + channel] = table[channel, image[3 * pixel + channel]]


@compiled
def _table(image, op, factor, host_table):
    """Return the lookup table of an operation, uint8 [3, 256]."""
    table = np.empty((3, LEVELS), np.uint8)
    if op in (AUTO_CONTRAST, EQUALIZE):
        counts = np.zeros((3, LEVELS), np.int64)
        for pixel in range(len(image) // 3):
            for channel in range(3):
                counts[channel, image[3 * pixel + channel]] += 1
        for channel in range(3):
            if op == EQUALIZE:
                _equalize_table(counts[channel], table[channel])
            else:
                _auto_contrast_table(counts[channel], table[channel])
    else:
        if op == CONTRAST:
            _contrast_table(image, factor, table[0])
        else:
            _copy(host_table, table[0])
        _copy(table[0], table[1])
        _copy(table[0], table[2])
    return table


@compiled
def _auto_contrast_table(counts, table):
    low, high = 0, LEVELS - 1
    while not counts[low]:
        low += 1
    while not counts[high]:
        high -= 1
    scale = 255.0 / max(high - low, 1)
    for old in range(LEVELS):
        table[old] = np.uint8(min(max(old * scale - low * scale, 0.0), 255.0)) if high > low else old


@compiled
def _equalize_table(counts, table):
    last, total = 0, 0
    for old in range(LEVELS):
        last = counts[old] if counts[old] else last
        total += counts[old]
    step, below = (total - last) // 255, 0
    for old in range(LEVELS):
        table[old] = min((step // 2 + below) // step, 255) if step > 0 else old
        below += counts[old]


@compiled
def _contrast_table(image, factor, table):
    pixels, total = len(image) // 3, 0
    for i in range(pixels):
        total += _luma(np.int32(image[3 * i]), np.int32(image[3 * i + 1]), np.int32(image[3 * i + 2]))
    mean = F((2 * total + pixels) // (2 * pixels))
    for old in range(LEVELS):
        table[old] = _byte((F(old) - mean) * factor + mean)


@compiled
def _color(image, factor, out):
    for i in range(len(image) // 3):
        red, green, blue = image[3 * i], image[3 * i + 1], image[3 * i + 2]
        gray = F(_luma(np.int32(red), np.int32(green), np.int32(blue)))
        out[3 * i] = _byte((F(red) - gray) * factor + gray)
        out[3 * i + 1] = _byte((F(green) - gray) * factor + gray)
        out[3 * i + 2] = _byte((F(blue) - gray) * factor + gray)


@compiled
def _sharpness(image, factor, height, width, out):
    values = width * 3
    _copy(image, out)  # the border is unchanged
    tall = np.empty(values, np.int16)
    for y in range(1, height - 1):
        at = y * values
        above, row, below = image[at - values : at], image[at : at + values], image[at + values : at + 2 * values]
        for i in range(values):
            tall[i] = np.int16(above[i]) + np.int16(row[i]) + np.int16(below[i])
        inner, to = row[3 : values - 3], out[at + 3 : at + values - 3]
        left, middle, right = tall[: values - 6], tall[3 : values - 3], tall[6:]
        for i in range(values - 6):
            total = left[i] + middle[i] + right[i] + (MIDDLE - 1) * np.int16(inner[i])
            smooth = np.floor((F(total) + HALF_WEIGHT) * INVERSE_WEIGHT)
            to[i] = _byte((F(inner[i]) - smooth) * factor + smooth)


@compiled
def _resample(image, coefficients, along_x, along_y, fill, height, width, padded, out):
    """Resample bicubically by an affine map, along one axis or both."""
    _pad(image, height, width, padded)
    stride = width + 2 * BORDER
    source_x, source_y = np.zeros(width), np.zeros(width)  # the sampled point of each pixel of a row
    t_x, t_y = np.empty(4 * width, np.float32), np.empty(4 * width, np.float32)
    column, row, first = np.empty(width, np.int32), np.empty(width, np.int32), np.empty(width, np.int32)
    centers = np.empty(width)
    for x in range(width):
        column[x], centers[x] = x + BORDER, x + 0.5
    words = np.empty(16 * BLOCK, np.uint32)
    taps = words.view(np.uint8).reshape(16, 4 * BLOCK)
    rows, result = np.empty((4, 4 * BLOCK), np.float32), np.empty(4 * BLOCK, np.float32)
    clipped = np.empty(4 * BLOCK, np.uint8)
    for y in range(height):
        if along_x:
            _locate(coefficients[:3], centers, y, source_x, column, t_x)
        if along_y:
            _locate(coefficients[3:], centers, y, source_y, row, t_y)
        else:
            for x in range(width):
                row[x] = y + BORDER
        for x in range(width):
            first[x] = row[x] * stride + column[x]  # index in the padded image
        start, stop = _inside(source_x, source_y, height, width)
        line = out[y * width * 3 : (y + 1) * width * 3]
        _fill(line[: 3 * start], fill)
        _fill(line[3 * stop :], fill)
        for x in range(start, stop, BLOCK):
            end = min(x + BLOCK, stop)
            if along_x and along_y:
                _gather(padded, first[x:end], 1, 4, stride, words)
                for i in range(4):
                    four = taps[4 * i : 4 * i + 4]
                    _cubic(four[0], four[1], four[2], four[3], t_x[4 * x : 4 * end], rows[i])
                _cubic(rows[0], rows[1], rows[2], rows[3], t_y[4 * x : 4 * end], result)
            else:
                step, t = (1, t_x[4 * x : 4 * end]) if along_x else (stride, t_y[4 * x : 4 * end])
                if _consecutive(first[x:end]):
                    at, step = padded[4 * first[x] :], 4 * step
                    _cubic(at, at[step:], at[2 * step :], at[3 * step :], t, result)
                else:
                    _gather(padded, first[x:end], step, 1, 0, words)
                    _cubic(taps[0], taps[1], taps[2], taps[3], t, result)
            _store(result[: 4 * (end - x)], clipped, line[3 * x : 3 * end])


@compiled
def _pad(image, height, width, padded):
    """Copy an image to four bytes per pixel and repeat the pixels on its edges BORDER times."""
    stride, values = 4 * (width + 2 * BORDER), 3 * width
    for row in range(height + 2 * BORDER):
        y = min(max(row - BORDER, 0), height - 1)
        source, line = image[y * values : (y + 1) * values], padded[row * stride : (row + 1) * stride]
        inner = line[4 * BORDER : stride - 4 * BORDER]
        for x in range(width):
            for channel in range(3):
                inner[4 * x + channel] = source[3 * x + channel]
            inner[4 * x + 3] = 0
        for i in range(4 * BORDER):
            line[i], line[stride - 4 * BORDER + i] = inner[i % 4], inner[len(inner) - 4 + i % 4]


@compiled
def _locate(coefficients, centers, y, source, first, t):
    """Compute where the pixels of row y are sampled along one axis.

    The map is computed in float64 like in PIL, so that pixels on the edge are classified in the same way.

    Args:
        coefficients: float64 [3]: a, b and c of the map ax + by + c.
        centers: float64 [width]: x of the pixels' centers.
        y: the row.
        source: float64 [width], set to the coordinates.
        first: int32 [width], set to the first of the four neighbors, in the padded image.
        t: float32 [4 * width], set to the distance from the second neighbor, four times per pixel.
    """
    a, b, c = coefficients[0], coefficients[1], coefficients[2]
    distance = np.empty(len(source), np.float32)
    for x in range(len(source)):  # several short loops, because LLVM vectorizes them better than one
        source[x] = a * centers[x] + b * (y + 0.5) + c
    for x in range(len(source)):
        first[x] = np.int32(np.floor(source[x] - 0.5)) + BORDER - 1
    for x in range(len(source)):
        distance[x] = (source[x] - 0.5) - np.floor(source[x] - 0.5)
    for x in range(len(source)):
        for channel in range(4):
            t[4 * x + channel] = distance[x]


@compiled
def _inside(source_x, source_y, height, width):
    """Return the first pixel of a row whose sampled point is inside the image, and the one after the last.

    The points are on a straight line, so the pixels between them are inside too.
    """
    start, stop = 0, width
    while start < stop and not (0 <= source_x[start] < width and 0 <= source_y[start] < height):
        start += 1
    while stop > start and not (0 <= source_x[stop - 1] < width and 0 <= source_y[stop - 1] < height):
        stop -= 1
    return start, stop


@compiled
def _consecutive(first):
    gaps = 0
    for i in range(len(first)):
        gaps |= first[i] - first[0] - i
    return gaps == 0


@compiled
def _fill(line, color):
    for pixel in range(len(line) // 3):
        for channel in range(3):
            line[3 * pixel + channel] = color[channel]


@compiled
def _gather(padded, first, step, rows, stride, words):
    """Copy four neighbors of each pixel, `step` pixels apart, in one or four rows, to uint32 [rows * 4, BLOCK]."""
    pixels = padded.view(np.uint32)
    for tap in range(4 * rows):
        source, to = pixels[tap // 4 * stride + tap % 4 * step :], words[tap * BLOCK : (tap + 1) * BLOCK]
        for i in range(len(first)):
            to[i] = source[np.uint32(first[i])]


@compiled
def _cubic(first, second, third, fourth, t, out):
    """Interpolate between four rows of values like `geometry._cubic`, in the same order of operations."""
    for i in range(len(t)):
        v1, v2, v3, v4 = F(first[i]), F(second[i]), F(third[i]), F(fourth[i])
        bend = (v3 - v4) + (v1 - v2)
        out[i] = ((((v1 - v2) + bend - bend * t[i]) * t[i]) + (v3 - v1)) * t[i] + v2


@compiled
def _store(values, clipped, out):
    """Convert four values per pixel to three bytes."""
    for i in range(len(values)):
        clipped[i] = _byte(values[i])
    for pixel in range(len(out) // 3):
        for channel in range(3):
            out[3 * pixel + channel] = clipped[4 * pixel + channel]

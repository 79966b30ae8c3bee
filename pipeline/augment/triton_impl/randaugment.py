"""Triton kernels of RandAugment on 8-bit images.

Each pass (`passes.py`) has two launches: `_histogram_tables` computes the lookup tables that depend on the images, and
`_apply` applies the operations. The PyTorch modules `tables`, `blend` and `geometry` define the operations. The kernels
produce exactly the same bytes: the same arithmetic in the same order and precision, compiled without fused
multiply-add, which rounds once where PyTorch rounds twice.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pipeline.augment.ops import Op
from pipeline.augment.params import SampleParams
from pipeline.augment.torch_impl import blend, tables
from pipeline.augment.transfer import upload
from pipeline.augment.triton_impl import passes

TILE, PART, WARPS = 2048, 128, 4  # pixels per program of `_apply`, and per iteration if an operation reads neighbors
BLOCK, HISTOGRAM_WARPS = 4096, 16  # pixels per iteration of `_histogram_tables`
CHANNELS = tl.constexpr(3)
JOB, MAP = tl.constexpr(4), tl.constexpr(6)  # columns of `OpPass.jobs` and `OpPass.numbers`
LEVELS = tl.constexpr(tables.LEVELS)
RED, GREEN, BLUE = (tl.constexpr(weight) for weight in tables.LUMA)
LUMA_HALF, LUMA_BITS = tl.constexpr(tables.LUMA_HALF), tl.constexpr(tables.LUMA_BITS)
MIDDLE, WEIGHTS = tl.constexpr(blend.MIDDLE), tl.constexpr(blend.WEIGHTS)
COPY, FLIP = tl.constexpr(passes.COPY), tl.constexpr(passes.FLIP)
EQUALIZE, CONTRAST = tl.constexpr(int(Op.EQUALIZE)), tl.constexpr(int(Op.CONTRAST))
COLOR, SHARPNESS = tl.constexpr(int(Op.COLOR)), tl.constexpr(int(Op.SHARPNESS))
SHEAR_X, TRANSLATE_X = tl.constexpr(int(Op.SHEAR_X)), tl.constexpr(int(Op.TRANSLATE_X))
SHEAR_Y, TRANSLATE_Y = tl.constexpr(int(Op.SHEAR_Y)), tl.constexpr(int(Op.TRANSLATE_Y))


@triton.jit
def _histogram_tables(source, jobs, numbers, histogram_jobs, tables, pixels, BLOCK: tl.constexpr):
    """Compute the tables of AutoContrast, Equalize and Contrast; a program computes one channel of one sample.

    The tables depend only on the histogram of the channel, or of the luma for Contrast. It consists of integers, so
    the result does not depend on the order of counting.
    """
    job, channel = tl.load(histogram_jobs + tl.program_id(0)), tl.program_id(1)
    code = tl.load(jobs + job * JOB)
    image = source + tl.load(jobs + job * JOB + 1).to(tl.int64) * pixels * CHANNELS
    counts = tl.zeros([LEVELS], tl.int32)
    for start in range(0, pixels, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < pixels
        if code == CONTRAST:
            red, green, blue = _pixel(image, at, mask)
            level = _luma(red, green, blue)
        else:
            level = tl.load(image + at * CHANNELS + channel, mask=mask, other=0).to(tl.int32)
        counts += tl.histogram(level, LEVELS, mask=mask)
    old = tl.arange(0, LEVELS)
    if code == CONTRAST:
        total = tl.sum(counts.to(tl.int64) * old)
        mean = ((2 * total + pixels) // (2 * pixels)).to(tl.float32)
        new = _blend(mean, old, tl.load(numbers + job * MAP).to(tl.float32))
    else:
        high = tl.max(tl.where(counts > 0, old, 0))
        if code == EQUALIZE:
            step = (pixels - tl.sum(tl.where(old == high, counts, 0))) // 255
            below = tl.cumsum(counts) - counts
            new = tl.where(step > 0, tl.minimum((step // 2 + below) // tl.maximum(step, 1), 255), old)
        else:
            low = tl.min(tl.where(counts > 0, old, 255))
            scale = 255.0 / tl.maximum(high - low, 1).to(tl.float64)
            stretched = _byte(old.to(tl.float64) * scale - low.to(tl.float64) * scale)
            new = tl.where(high > low, stretched, old)
    table = tl.load(jobs + job * JOB + 3)
    tl.store(tables + (table * CHANNELS + channel) * LEVELS + old, new.to(tl.uint8))


@triton.jit(do_not_specialize=("fill_red", "fill_green", "fill_blue"))
def _apply(
    source,
    work,
    jobs,
    numbers,
    tables,
    width,
    height,
    fill_red,
    fill_green,
    fill_blue,
    TILE: tl.constexpr,
    PART: tl.constexpr,
):
    """Apply the operations of a pass to TILE pixels of one sample.

    source and work are uint8 [samples, height, width, 3].
    """
    job, first = tl.program_id(1), tl.program_id(0) * TILE
    code, table = tl.load(jobs + job * JOB), tl.load(jobs + job * JOB + 3)
    pixels = height * width
    image = source + tl.load(jobs + job * JOB + 1).to(tl.int64) * pixels * CHANNELS
    out = work + tl.load(jobs + job * JOB + 2).to(tl.int64) * pixels * CHANNELS
    own = numbers + job * MAP
    if (code == COPY) | (table >= 0):
        for third in tl.static_range(3):  # each iteration loads 16 bytes per thread
            at = first * CHANNELS + third * TILE + tl.arange(0, TILE)
            mask = at < pixels * CHANNELS
            value = tl.load(image + at, mask=mask, other=0)
            if table >= 0:
                entry = (table * CHANNELS + at % CHANNELS) * LEVELS + value.to(tl.int32)
                value = tl.load(tables + entry, mask=mask, other=0)
            tl.store(out + at, value, mask=mask)
    else:
        for start in range(first, tl.minimum(first + TILE, pixels), PART):
            at = start + tl.arange(0, PART)
            mask = at < pixels
            y, x = at // width, at % width
            if code == FLIP:
                red, green, blue = _pixel(image, y * width + (width - 1 - x), mask)
            elif code == COLOR:
                red, green, blue = _pixel(image, at, mask)
                gray, factor = _luma(red, green, blue).to(tl.float32), tl.load(own).to(tl.float32)
                red, green, blue = _blend(gray, red, factor), _blend(gray, green, factor), _blend(gray, blue, factor)
            elif code == SHARPNESS:
                red, green, blue = _sharpness(image, at, mask, x, y, width, height, tl.load(own).to(tl.float32))
            else:
                if (code == SHEAR_X) | (code == TRANSLATE_X):
                    red, green, blue, inside = _resample(image, own, mask, x, y, width, height, True, False)
                elif (code == SHEAR_Y) | (code == TRANSLATE_Y):
                    red, green, blue, inside = _resample(image, own, mask, x, y, width, height, False, True)
                else:
                    red, green, blue, inside = _resample(image, own, mask, x, y, width, height, True, True)
                red = tl.where(inside, red, fill_red)
                green = tl.where(inside, green, fill_green)
                blue = tl.where(inside, blue, fill_blue)
            tl.store(out + at * CHANNELS, red.to(tl.uint8), mask=mask)
            tl.store(out + at * CHANNELS + 1, green.to(tl.uint8), mask=mask)
            tl.store(out + at * CHANNELS + 2, blue.to(tl.uint8), mask=mask)


@triton.jit
def _pixel(image, at, mask):
    """Load red, green and blue of pixels, int32."""
    red = tl.load(image + at * CHANNELS, mask=mask, other=0).to(tl.int32)
    green = tl.load(image + at * CHANNELS + 1, mask=mask, other=0).to(tl.int32)
    blue = tl.load(image + at * CHANNELS + 2, mask=mask, other=0).to(tl.int32)
    return red, green, blue


@triton.jit
def _byte(value):
    """Clip to 0 to 255 and truncate to int32."""
    return tl.minimum(tl.maximum(value, 0.0), 255.0).to(tl.int32)


@triton.jit
def _luma(red, green, blue):
    return (red * RED + green * GREEN + blue * BLUE + LUMA_HALF) >> LUMA_BITS


@triton.jit
def _blend(degenerate, value, factor):
    """Blend int32 values with float32 degenerate values by a float32 factor; the result is int32."""
    return _byte((value.to(tl.float32) - degenerate) * factor + degenerate)


@triton.jit
def _sharpness(image, at, mask, x, y, width, height, factor):
    """Return red, green and blue (int32) of pixels that are blended with the smoothed image, except on the border."""
    red, green, blue = _pixel(image, at, mask)
    inner = mask & (x > 0) & (x < width - 1) & (y > 0) & (y < height - 1)
    reds, greens, blues = red * (MIDDLE - 1), green * (MIDDLE - 1), blue * (MIDDLE - 1)
    for down in tl.static_range(-1, 2):
        for right in tl.static_range(-1, 2):
            neighbor = _pixel(image, at + down * width + right, inner)
            reds, greens, blues = reds + neighbor[0], greens + neighbor[1], blues + neighbor[2]
    return (
        _blend_smooth(red, reds, inner, factor),
        _blend_smooth(green, greens, inner, factor),
        _blend_smooth(blue, blues, inner, factor),
    )


@triton.jit
def _blend_smooth(value, total, inner, factor):
    """Blend a channel with its smoothed value, which is computed from the weighted sum of the 3 x 3 pixels."""
    smooth = tl.floor((total.to(tl.float32) + WEIGHTS / 2) * (1 / WEIGHTS))
    return _blend(tl.where(inner, smooth, value.to(tl.float32)), value, factor)


@triton.jit
def _resample(image, numbers, mask, x, y, width, height, ALONG_X: tl.constexpr, ALONG_Y: tl.constexpr):
    """Resample bicubically by an affine map; return red, green, blue (int32), and whether the source is in the image.

    The map is computed in float64, like in PIL, so that pixels on the edge are classified in the same way.
    """
    center_x, center_y = x.to(tl.float64) + 0.5, y.to(tl.float64) + 0.5
    inside, fraction_x, fraction_y = mask, 0.0, 0.0
    if ALONG_X:
        a, b, c = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)
        within, x, fraction_x = _locate(a * center_x + b * center_y + c, width)
        inside = inside & within
    if ALONG_Y:
        d, e, f = tl.load(numbers + 3), tl.load(numbers + 4), tl.load(numbers + 5)
        within, y, fraction_y = _locate(d * center_x + e * center_y + f, height)
        inside = inside & within
        r1, g1, b1 = _row(image, y - 1, x, fraction_x, inside, width, height, ALONG_X)
        r2, g2, b2 = _row(image, y, x, fraction_x, inside, width, height, ALONG_X)
        r3, g3, b3 = _row(image, y + 1, x, fraction_x, inside, width, height, ALONG_X)
        r4, g4, b4 = _row(image, y + 2, x, fraction_x, inside, width, height, ALONG_X)
        red, green = _cubic(r1, r2, r3, r4, fraction_y), _cubic(g1, g2, g3, g4, fraction_y)
        blue = _cubic(b1, b2, b3, b4, fraction_y)
    else:
        red, green, blue = _row(image, y, x, fraction_x, inside, width, height, ALONG_X)
    return _byte(red), _byte(green), _byte(blue), inside


@triton.jit
def _locate(source, size):
    """Return whether a coordinate is in the image, the second of its four neighbors, and its distance from it."""
    before = tl.floor(source - 0.5)
    return (source >= 0) & (source < size), before.to(tl.int32), (source - 0.5 - before).to(tl.float32)


@triton.jit
def _row(image, y, x, fraction, inside, width, height, ALONG_X: tl.constexpr):
    """Load red, green and blue (float32) in row y at x, or interpolate at x + fraction if ALONG_X.

    Neighbors are clamped to the image.
    """
    first = tl.minimum(tl.maximum(y, 0), height - 1) * width
    red, green, blue = _pixel(image, first + tl.minimum(tl.maximum(x, 0), width - 1), inside)
    red, green, blue = red.to(tl.float32), green.to(tl.float32), blue.to(tl.float32)
    if ALONG_X:
        r1, g1, b1 = _pixel(image, first + tl.minimum(tl.maximum(x - 1, 0), width - 1), inside)
        r3, g3, b3 = _pixel(image, first + tl.minimum(tl.maximum(x + 1, 0), width - 1), inside)
        r4, g4, b4 = _pixel(image, first + tl.minimum(tl.maximum(x + 2, 0), width - 1), inside)
        red = _cubic(r1.to(tl.float32), red, r3.to(tl.float32), r4.to(tl.float32), fraction)
        green = _cubic(g1.to(tl.float32), green, g3.to(tl.float32), g4.to(tl.float32), fraction)
        blue = _cubic(b1.to(tl.float32), blue, b3.to(tl.float32), b4.to(tl.float32), fraction)
    return red, green, blue


@triton.jit
def _cubic(v1, v2, v3, v4, t):
    """Interpolate like `geometry._cubic`, with the same operations in the same order."""
    bend = (v3 - v4) + (v1 - v2)
    return ((((v1 - v2) + bend - bend * t) * t) + (v3 - v1)) * t + v2


def apply_ops(images: Tensor, params: SampleParams, fill: tuple[int, int, int], *, flip: bool) -> Tensor:
    """Apply RandAugment to a batch, and the flips if `flip` is set.

    Args:
        images: uint8 [B, H, W, 3], contiguous; not modified.
        params: parameters of the B samples.
        fill: red, green and blue (0 to 255) of areas that geometric operations leave uncovered.
        flip: whether to apply the flips, before RandAugment.

    Returns:
        uint8 [B, H, W, 3], contiguous: a new tensor, or `images` itself if there is no operation to apply.
    """
    batch, height, width, _ = images.shape
    todo = passes.plan_passes(params, height, width, flip=flip)
    if not todo:
        return images
    tensors = iter(upload([array for each in todo for array in each.arrays()], images.device))
    source, work = images, images.new_empty(2 * batch, height, width, 3)
    for _ in todo:
        jobs, numbers, histogram_jobs, tables = (next(tensors) for _ in range(4))
        if len(histogram_jobs):
            _histogram_tables[(len(histogram_jobs), CHANNELS.value)](
                source,
                jobs,
                numbers,
                histogram_jobs,
                tables,
                height * width,
                BLOCK=BLOCK,
                num_warps=HISTOGRAM_WARPS,
                enable_fp_fusion=False,
            )
        _apply[(triton.cdiv(height * width, TILE), len(jobs))](
            source,
            work,
            jobs,
            numbers,
            tables,
            width,
            height,
            *fill,
            TILE=TILE,
            PART=PART,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
        source = work
    return work[:batch]

"""Triton kernels of the weight and bias gradients of a depthwise convolution, a split reduction in two passes.

A program iterates over the tiles of its part of the batch, and every thread accumulates one fp32 sum per tap. A second
kernel adds the sums of all parts. There are no atomic additions, so the result is deterministic.
`fat.kernels.impl.tiles` chooses one of two forms:

- strips: a thread processes one column of a tile and 4 or 8 channels, and loads each row of x once per kernel column.
- patches: a thread processes adjacent columns of one channel (7 if they divide the feature map), row after row. A value
  of x is loaded and converted once, and used for all taps and columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fat.kernels.impl import tiles

# Sizes and loop counts that do not change the code. They are not specialized, so that all image sizes share a kernel.
_SIZES = [
    *("batch", "height", "width", "grad_height", "grad_width"),
    *("row_tiles", "col_tiles", "channel_tiles", "tiles_each", "rows_each"),
]


@triton.jit
def _completed(value, result, slope, shift, inside):
    """Return the gradient of the convolution's result in fp32, including the gradient through its statistics. It is 0
    outside the feature map."""
    return value.to(tl.float32) + (result.to(tl.float32) * slope[None, :] + tl.where(inside, shift[None, :], 0.0))


@triton.jit
def _from_statistics(mean, grad_mean, grad_var, c, mask, count):
    """(slope, shift) fp32 [channels]: the gradient of y through its mean and variance is slope * y + shift."""
    slope = tl.load(grad_var + c, mask=mask, other=0.0) * (2.0 / count)
    shift = tl.load(grad_mean + c, mask=mask, other=0.0) / count - slope * tl.load(mean + c, mask=mask, other=0.0)
    return slope, shift


@triton.jit(do_not_specialize=_SIZES)
def _strips(
    gradient,
    x,
    out,
    bias_out,
    y,
    mean,
    grad_mean,
    grad_var,
    completed,
    batch,
    height,
    width,
    grad_height,
    grad_width,
    row_tiles,
    col_tiles,
    channel_tiles,
    tiles_each,
    channels,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """gradient [B, grad_height, grad_width, channels], x [B, height, width, channels] -> out fp32 [parts, channels,
    KERNEL^2] and bias_out fp32 [parts, channels], the sums of each part. A program computes COLUMNS kernel columns.

    With y, the convolution's result, the gradient through its mean and variance [channels] is added to the gradient,
    and the sum is stored in completed.
    """
    pad: tl.constexpr = KERNEL // 2
    groups: tl.constexpr = (KERNEL + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    group = program % groups
    rest = program // groups
    c = (rest % channel_tiles) * CHANNELS + tl.arange(0, CHANNELS)
    part = rest // channel_tiles
    mask = c < channels
    first_tap = group * COLUMNS

    sums = ()
    for _ in tl.static_range(COLUMNS * KERNEL):
        sums = sums + (tl.zeros((COLS, CHANNELS), tl.float32),)
    bias_sum = tl.zeros((COLS, CHANNELS), tl.float32)
    slope, shift = 0.0, 0.0
    if y is not None:
        slope, shift = _from_statistics(mean, grad_mean, grad_var, c, mask, batch * grad_height * grad_width)

    start = part * tiles_each
    end = tl.minimum(start + tiles_each, batch * row_tiles * col_tiles)
    for tile in range(start, end):
        col = (tile % col_tiles) * COLS + tl.arange(0, COLS)
        top = (tile // col_tiles % row_tiles) * ROWS
        sample = (tile // col_tiles // row_tiles).to(tl.int64)
        base = sample * grad_height * grad_width * channels
        source = x + sample * height * width * channels
        grads, results = (), ()
        for r in tl.static_range(ROWS):
            inside = (col < grad_width)[:, None] & mask[None, :] & (top + r < grad_height)
            at = base + ((top + r) * grad_width * channels + col[:, None] * channels + c[None, :])
            grads = grads + (tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32),)
            if y is not None:
                results = results + (tl.load(y + at, mask=inside, other=0.0),)
        if y is not None:  # store after all loads: the compiler does not move a load before a store
            for r in tl.static_range(ROWS):
                inside = (col < grad_width)[:, None] & mask[None, :] & (top + r < grad_height)
                at = base + ((top + r) * grad_width * channels + col[:, None] * channels + c[None, :])
                grad_out = _completed(grads[r], results[r], slope, shift, inside)
                tl.store(completed + at, grad_out.to(completed.dtype.element_ty), mask=inside & (group == 0))
                grads = grads[:r] + (grad_out,) + grads[r + 1 :]
        for r in tl.static_range(ROWS):
            bias_sum += grads[r]
        for j in tl.static_range(COLUMNS):
            source_col = col * STRIDE + (first_tap + j - pad)
            col_mask = ((source_col >= 0) & (source_col < width))[:, None] & mask[None, :]
            offsets = source_col[:, None] * channels + c[None, :]
            for i in tl.static_range((ROWS - 1) * STRIDE + KERNEL):
                row = top * STRIDE + (i - pad)
                inside = col_mask & ((row >= 0) & (row < height))
                values = tl.load(source + row * width * channels + offsets, mask=inside, other=0.0).to(tl.float32)
                for r in tl.static_range(ROWS):
                    if i - r * STRIDE >= 0 and i - r * STRIDE < KERNEL:
                        new = sums[(i - r * STRIDE) * COLUMNS + j] + values * grads[r]
                        before = sums[: (i - r * STRIDE) * COLUMNS + j]
                        sums = before + (new,) + sums[(i - r * STRIDE) * COLUMNS + j + 1 :]

    out += part * channels * KERNEL * KERNEL
    for tap_row in tl.static_range(KERNEL):
        for j in tl.static_range(COLUMNS):
            tap = tap_row * KERNEL + first_tap + j
            total = tl.sum(sums[tap_row * COLUMNS + j], axis=0)
            tl.store(out + c * KERNEL * KERNEL + tap, total, mask=mask & (first_tap + j < KERNEL))
    tl.store(bias_out + part * channels + c, tl.sum(bias_sum, axis=0), mask=mask & (group == 0))


@triton.jit
def _products(
    total, values, grad_out, FIRST: tl.constexpr, STRIDE: tl.constexpr, ACROSS: tl.constexpr, READ: tl.constexpr
):
    """Add the products of one tap to total: for each column q, the gradient times value q * STRIDE + FIRST of a row of
    x, if this is one of the READ values."""
    for q in tl.static_range(ACROSS):
        if q * STRIDE + FIRST >= 0 and q * STRIDE + FIRST < READ:
            total += values[q * STRIDE + FIRST] * grad_out[q]
    return total


@triton.jit
def _gradient_row(
    gradient,
    y,
    base,
    row,
    valid,
    left,
    grad_height,
    grad_width,
    channels: tl.constexpr,
    ACROSS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Load ACROSS values of a row of the gradient, and of y if it is given; 0 outside the feature map."""
    inside = valid & ((row >= 0) & (row < grad_height))
    line = base + row * grad_width * channels
    values = _across(gradient + line, inside, left, grad_width, channels, ACROSS, EVEN)
    if y is not None:
        values = values + _across(y + line, inside, left, grad_width, channels, ACROSS, EVEN)
    return values


@triton.jit
def _across(line, inside, left, grad_width, channels: tl.constexpr, ACROSS: tl.constexpr, EVEN: tl.constexpr):
    values = ()
    for q in tl.static_range(ACROSS):
        within = inside
        if not EVEN:
            within = inside & (left + q < grad_width)[:, None]
        values = values + (tl.load(line + q * channels, mask=within, other=0.0),)
    return values


@triton.jit
def _rows(
    gradient,
    y,
    base,
    source,
    row,
    stop,
    ahead,
    valid,
    left,
    first,
    height,
    width,
    grad_height,
    grad_width,
    channels: tl.constexpr,
    STRIDE: tl.constexpr,
    ACROSS: tl.constexpr,
    READ: tl.constexpr,
    INNER: tl.constexpr,
    TOGETHER: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Load the inputs of TOGETHER steps, starting at `row`.

    Each step has a row of the gradient, a row of y, and STRIDE rows of x.
    """
    values = ()
    for step in tl.static_range(TOGETHER):
        current = row + step
        mask = valid & (current < stop)
        values = values + _gradient_row(
            gradient, y, base, current + ahead, mask, left, grad_height, grad_width, channels, ACROSS, EVEN
        )
        values = values + _x_rows(
            source, current, mask, first, height, width, channels, STRIDE, ACROSS, READ, INNER, EVEN
        )
    return values


@triton.jit
def _x_rows(
    source,
    row,
    valid,
    first,
    height,
    width,
    channels: tl.constexpr,
    STRIDE: tl.constexpr,
    ACROSS: tl.constexpr,
    READ: tl.constexpr,
    INNER: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Load READ values of each of the STRIDE rows of x from row * STRIDE on; 0 outside the feature map."""
    values = ()
    for t in tl.static_range(STRIDE):
        line = source + (row * STRIDE + t) * width * channels
        for n in tl.static_range(READ):
            inside = valid
            if not EVEN or n < INNER or n >= INNER + STRIDE * ACROSS:
                inside = valid & ((first + n >= 0) & (first + n < width))[:, None]
            if not EVEN:
                inside = inside & (row * STRIDE + t < height)
            values = values + (tl.load(line + n * channels, mask=inside, other=0.0),)
    return values


@triton.jit
def _complete_row(
    values,
    completed,
    base,
    row,
    valid,
    stored,
    left,
    slope,
    shift,
    grad_height,
    grad_width,
    channels: tl.constexpr,
    ACROSS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Convert a row of the gradient to fp32. With completed, add the gradient through the statistics of y and store the
    sum in completed."""
    grads = ()
    inside = valid & ((row >= 0) & (row < grad_height))
    if completed is not None:
        line = completed + (base + row * grad_width * channels)
    for q in tl.static_range(ACROSS):
        if completed is None:
            grad_out = values[q].to(tl.float32)
        else:
            within = inside
            if not EVEN:
                within = inside & (left + q < grad_width)[:, None]
            grad_out = _completed(values[q], values[ACROSS + q], slope, shift, within)
            tl.store(line + q * channels, grad_out.to(completed.dtype.element_ty), mask=within & stored)
        grads = grads + (grad_out,)
    return grads


@triton.jit(do_not_specialize=_SIZES)
def _patches(
    gradient,
    x,
    out,
    bias_out,
    y,
    mean,
    grad_mean,
    grad_var,
    completed,
    batch,
    height,
    width,
    grad_height,
    grad_width,
    row_tiles,
    col_tiles,
    channel_tiles,
    tiles_each,
    rows_each,
    channels: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    TAP_ROWS: tl.constexpr,
    ACROSS: tl.constexpr,
    COLS: tl.constexpr,
    CHANNELS: tl.constexpr,
    TOGETHER: tl.constexpr,
    EARLY: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Like `_strips`, but a program computes TAP_ROWS kernel rows (all of them at stride 2).

    A patch is ACROSS columns of a sample. A tile is rows_each rows of COLS patches, which are numbered over all
    samples. A thread keeps those DEPTH rows of the gradient to which the current row of x contributes, and loads one
    more with each row.

    The inputs of TOGETHER rows are loaded at once and, if EARLY, while the previous rows are processed. In both cases
    they are loaded before anything is stored. The compiler cannot know that the tensors do not overlap, so it moves no
    load before a store; the store waits for its values, and the loads of a row would wait for memory one after another.

    WHOLE: a patch is as wide as the feature map. EVEN: patches fill the feature map exactly, and x is STRIDE times as
    large as the gradient.
    """
    pad: tl.constexpr = KERNEL // 2
    groups: tl.constexpr = (KERNEL + TAP_ROWS - 1) // TAP_ROWS
    # Kernel row i of a group multiplies row r * STRIDE + t of x with row r + (t + pad - i) / STRIDE of the gradient
    # (minus the group's first kernel row). The first of these gradient rows is `behind` rows before r.
    behind: tl.constexpr = TAP_ROWS - 1 - pad if STRIDE == 1 else pad // STRIDE
    DEPTH: tl.constexpr = TAP_ROWS if STRIDE == 1 else pad // STRIDE + (pad + STRIDE - 1) // STRIDE + 1
    owner: tl.constexpr = pad // TAP_ROWS  # the group that loads every row of the gradient; it computes bias_out
    skipped: tl.constexpr = pad if WHOLE else 0  # number of padding columns per side that are not loaded
    READ: tl.constexpr = ACROSS * STRIDE if WHOLE else (ACROSS - 1) * STRIDE + KERNEL  # columns loaded per row of x
    INNER: tl.constexpr = pad - skipped  # the first loaded column of x that is inside the patch
    UPPER: tl.constexpr = ACROSS if y is None else 2 * ACROSS  # number of values loaded per row of gradient and y
    program = tl.program_id(0)
    group = program % groups
    rest = program // groups
    c = (rest % channel_tiles) * CHANNELS + tl.arange(0, CHANNELS)
    part = rest // channel_tiles
    mask = c < channels
    ahead = DEPTH - 1 - behind - group * TAP_ROWS  # newest loaded row of the gradient, relative to the current row

    sums = ()
    for _ in tl.static_range(TAP_ROWS * KERNEL):
        sums = sums + (tl.zeros((COLS, CHANNELS), tl.float32),)
    bias_sum = tl.zeros((COLS, CHANNELS), tl.float32)
    slope, shift = 0.0, 0.0
    if y is not None:
        slope, shift = _from_statistics(mean, grad_mean, grad_var, c, mask, batch * grad_height * grad_width)

    start = part * tiles_each
    end = tl.minimum(start + tiles_each, row_tiles * tl.cdiv(batch * col_tiles, COLS))
    for tile in range(start, end):
        top = (tile % row_tiles) * rows_each
        patch = (tile // row_tiles) * COLS + tl.arange(0, COLS)
        sample = patch // col_tiles
        left = (patch - sample * col_tiles) * ACROSS
        valid = (sample < batch)[:, None] & mask[None, :]
        sample = sample.to(tl.int64)
        first = left * STRIDE + (skipped - pad)
        base = (sample * grad_height * grad_width + left)[:, None] * channels + c[None, :]
        source = x + ((sample * height * width + first)[:, None] * channels + c[None, :])
        begin = tl.maximum(top, -ahead)  # rows of the tile outside [begin, stop) contribute to no gradient row
        stop = tl.minimum(tl.minimum(top + rows_each, grad_height), grad_height - ahead + DEPTH - 1)

        older = ()
        for n in tl.static_range(DEPTH - 1):
            before = begin + ahead - (DEPTH - 1) + n
            older = older + _gradient_row(
                gradient, y, base, before, valid, left, grad_height, grad_width, channels, ACROSS, EVEN
            )
        if EARLY:
            next_rows = _rows(
                gradient,
                y,
                base,
                source,
                begin,
                stop,
                ahead,
                valid,
                left,
                first,
                height,
                width,
                grad_height,
                grad_width,
                channels,
                STRIDE,
                ACROSS,
                READ,
                INNER,
                TOGETHER,
                EVEN,
            )
        window = ()  # the last DEPTH - 1 loaded rows of the gradient, the oldest first
        for n in tl.static_range(DEPTH - 1):
            before = begin + ahead - (DEPTH - 1) + n
            earlier = (before >= top) & (before < top + rows_each)
            window = window + _complete_row(
                older[n * UPPER :][:UPPER],
                completed,
                base,
                before,
                valid,
                earlier & (group == owner),
                left,
                slope,
                shift,
                grad_height,
                grad_width,
                channels,
                ACROSS,
                EVEN,
            )
            for q in tl.static_range(ACROSS):
                bias_sum += tl.where(earlier, window[n * ACROSS + q], 0.0)
        for start_row in range(begin, stop, TOGETHER):
            if EARLY:
                rows = next_rows
                next_rows = _rows(
                    gradient,
                    y,
                    base,
                    source,
                    start_row + TOGETHER,
                    stop,
                    ahead,
                    valid,
                    left,
                    first,
                    height,
                    width,
                    grad_height,
                    grad_width,
                    channels,
                    STRIDE,
                    ACROSS,
                    READ,
                    INNER,
                    TOGETHER,
                    EVEN,
                )
            else:
                rows = _rows(
                    gradient,
                    y,
                    base,
                    source,
                    start_row,
                    stop,
                    ahead,
                    valid,
                    left,
                    first,
                    height,
                    width,
                    grad_height,
                    grad_width,
                    channels,
                    STRIDE,
                    ACROSS,
                    READ,
                    INNER,
                    TOGETHER,
                    EVEN,
                )
            for step in tl.static_range(TOGETHER):
                row = start_row + step
                newest = row + ahead
                in_tile = (newest >= top) & (newest < top + rows_each) & (row < stop)
                loaded = rows[step * (UPPER + STRIDE * READ) :][: UPPER + STRIDE * READ]
                newer = _complete_row(
                    loaded,
                    completed,
                    base,
                    newest,
                    valid,
                    in_tile & (group == owner),
                    left,
                    slope,
                    shift,
                    grad_height,
                    grad_width,
                    channels,
                    ACROSS,
                    EVEN,
                )
                row_sum = tl.zeros((COLS, CHANNELS), tl.float32)
                for q in tl.static_range(ACROSS):
                    row_sum += newer[q]
                bias_sum += tl.where(in_tile, row_sum, 0.0)
                window = window + newer
                for t in tl.static_range(STRIDE):
                    values = ()
                    for n in tl.static_range(READ):
                        values = values + (loaded[UPPER + t * READ + n].to(tl.float32),)
                    new = ()  # a new tuple per row: Triton's compiler is slow if elements of a long tuple are replaced
                    for i in tl.static_range(TAP_ROWS):
                        if (t + pad - i) % STRIDE == 0:
                            below = window[((t + pad - i) // STRIDE + behind) * ACROSS :][:ACROSS]
                            for j in tl.static_range(KERNEL):
                                new = new + (
                                    _products(sums[i * KERNEL + j], values, below, j - skipped, STRIDE, ACROSS, READ),
                                )
                        else:
                            new = new + sums[i * KERNEL : (i + 1) * KERNEL]
                    sums = new
                window = window[ACROSS:]

    out += part * channels * KERNEL * KERNEL
    for i in tl.static_range(TAP_ROWS):
        for j in tl.static_range(KERNEL):
            tap = (group * TAP_ROWS + i) * KERNEL + j
            total = tl.sum(sums[i * KERNEL + j], axis=0)
            tl.store(out + c * KERNEL * KERNEL + tap, total, mask=mask & (tap < KERNEL * KERNEL))
    tl.store(bias_out + part * channels + c, tl.sum(bias_sum, axis=0), mask=mask & (group == owner))


@triton.jit
def _column_sums(source, target, block, columns, parts, ROWS: tl.constexpr, WIDE: tl.constexpr):
    column = block * WIDE + tl.arange(0, WIDE)
    mask = column < columns
    sums = tl.zeros((ROWS, WIDE), tl.float32)
    for first in range(0, parts, ROWS):
        part = first + tl.arange(0, ROWS)
        inside = (part < parts)[:, None] & mask[None, :]
        sums += tl.load(source + part[:, None] * columns + column[None, :], mask=inside, other=0.0)
    tl.store(target + column, tl.sum(sums, axis=0), mask=mask)


@triton.jit(do_not_specialize=("parts",))
def _add_parts(
    out, bias_out, grad_weight, grad_bias, parts, channels, TAPS: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr
):
    """Sum out [parts, channels, TAPS] and bias_out [parts, channels] over the parts, in one launch."""
    block = tl.program_id(0)
    blocks = tl.cdiv(channels * TAPS, WIDE)
    if block < blocks:
        _column_sums(out, grad_weight, block, channels * TAPS, parts, ROWS, WIDE)
    else:
        _column_sums(bias_out, grad_bias, block - blocks, channels, parts, ROWS, WIDE)


@dataclass(frozen=True)
class Statistics:
    """The convolution's result y, its mean, and the gradients of its mean and variance, fp32 [C]."""

    y: Tensor
    mean: Tensor
    grad_mean: Tensor
    grad_var: Tensor
    completed: Tensor
    """Receives the complete gradient of y."""

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        """Arguments in the kernels' order."""
        return self.y, self.mean, self.grad_mean, self.grad_var, self.completed


def weight_gradient(
    grad_out: Tensor, x: Tensor, *, kernel: int, stride: int, statistics: Statistics | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of weight, fp32 [C, 1, k, k], and bias, fp32 [C].

    statistics: first add the gradient through the result's mean and variance to grad_out.
    """
    batch, channels, height, width = x.shape
    grad_height, grad_width = grad_out.shape[2:]
    form = tiles.weight_gradient(kernel, stride, grad_height, grad_width, channels)
    grid = form.grid(kernel, batch, grad_height, grad_width, channels)
    out = x.new_empty(grid.parts, channels, kernel * kernel, dtype=torch.float32)
    bias_out = x.new_empty(grid.parts, channels, dtype=torch.float32)
    launch, sizes, constants = _strips, (), {}
    if isinstance(form, tiles.Patches):
        launch, sizes, constants = _patches, (form.rows,), _fit(form, x, grad_out, stride)
    launch[(grid.programs,)](
        grad_out,
        x,
        out,
        bias_out,
        *((None,) * 5 if statistics is None else statistics.arguments),
        batch,
        height,
        width,
        grad_height,
        grad_width,
        grid.row_tiles,
        grid.col_tiles,
        grid.channel_tiles,
        grid.tiles_each,
        *sizes,
        channels,
        KERNEL=kernel,
        STRIDE=stride,
        **form.constants,
        **constants,
        num_warps=form.warps,
    )
    grad_weight = out.new_empty(channels, 1, kernel, kernel)
    grad_bias = bias_out.new_empty(channels)
    rows, wide, warps = tiles.sum_parts_shape(grid.parts)
    _add_parts[(triton.cdiv(channels * kernel * kernel, wide) + triton.cdiv(channels, wide),)](
        out,
        bias_out,
        grad_weight,
        grad_bias,
        grid.parts,
        channels,
        TAPS=kernel * kernel,
        ROWS=rows,
        WIDE=wide,
        num_warps=warps,
    )
    return grad_weight, grad_bias


def _fit(form: tiles.Patches, x: Tensor, grad_out: Tensor, stride: int) -> dict[str, bool]:
    """Return the constexpr arguments that describe how patches fit the feature maps."""
    height, width = grad_out.shape[2:]
    even = width % form.across == 0 and x.shape[2:] == (height * stride, width * stride)
    return {"WHOLE": even and form.across == width, "EVEN": even}

"""Triton: gradients of a depthwise convolution by weight and bias, a split reduction in two passes.

A program walks over tiles of its part of the batch and keeps one fp32 sum per tap in every thread; the parts are added
by a second reduction. No atomics: the same input gives the same bits. `fat.kernels.impl.tiles` chooses one of two
forms:

- strips: a thread owns one column of a tile and 4 or 8 channels, and reads each row of x again for each kernel column;
- patches: a thread owns adjacent columns, 7 where they divide the map, of one channel, and walks down the rows. A value
  of x that has been read and converted serves every tap and column that it falls under.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fat.kernels.impl import tiles

# Sizes and loop counts that do not change the code: not specialised, so that maps of several sizes share a kernel.
_SIZES = [
    *("batch", "height", "width", "grad_height", "grad_width"),
    *("row_tiles", "col_tiles", "channel_tiles", "tiles_each", "rows_each"),
]


@triton.jit
def _completed(value, result, slope, shift, inside):
    """The gradient by the convolution's result, fp32, with what the result's statistics add. 0 outside, as both are."""
    return value.to(tl.float32) + (result.to(tl.float32) * slope[None, :] + tl.where(inside, shift[None, :], 0.0))


@triton.jit
def _from_statistics(mean, grad_mean, grad_var, c, mask, count):
    """(slope, shift) fp32 [channels]: what mean and variance add to the gradient by y is slope * y + shift."""
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
    KERNEL^2] and bias_out fp32 [parts, channels]: each part's sums. A program takes COLUMNS kernel columns.

    With y, the convolution's result, the gradients by its mean and variance [channels] are added to the gradient, and
    the sum is written to completed.
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
        uppers, results = (), ()
        for r in tl.static_range(ROWS):
            inside = (col < grad_width)[:, None] & mask[None, :] & (top + r < grad_height)
            place = base + ((top + r) * grad_width * channels + col[:, None] * channels + c[None, :])
            uppers = uppers + (tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32),)
            if y is not None:
                results = results + (tl.load(y + place, mask=inside, other=0.0),)
        if y is not None:  # only now: loads do not pass a store, which waits for its own
            for r in tl.static_range(ROWS):
                inside = (col < grad_width)[:, None] & mask[None, :] & (top + r < grad_height)
                place = base + ((top + r) * grad_width * channels + col[:, None] * channels + c[None, :])
                grad_out = _completed(uppers[r], results[r], slope, shift, inside)
                tl.store(completed + place, grad_out.to(completed.dtype.element_ty), mask=inside & (group == 0))
                uppers = uppers[:r] + (grad_out,) + uppers[r + 1 :]
        for r in tl.static_range(ROWS):
            bias_sum += uppers[r]
        for j in tl.static_range(COLUMNS):
            source_col = col * STRIDE + (first_tap + j - pad)
            here = ((source_col >= 0) & (source_col < width))[:, None] & mask[None, :]
            offsets = source_col[:, None] * channels + c[None, :]
            for i in tl.static_range((ROWS - 1) * STRIDE + KERNEL):
                row = top * STRIDE + (i - pad)
                inside = here & ((row >= 0) & (row < height))
                values = tl.load(source + row * width * channels + offsets, mask=inside, other=0.0).to(tl.float32)
                for r in tl.static_range(ROWS):
                    if i - r * STRIDE >= 0 and i - r * STRIDE < KERNEL:
                        new = sums[(i - r * STRIDE) * COLUMNS + j] + values * uppers[r]
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
    """total plus the products of one tap: column q of a row of the gradient and value q * STRIDE + FIRST of a row of x,
    as far as it is one of the READ values."""
    for q in tl.static_range(ACROSS):
        if q * STRIDE + FIRST >= 0 and q * STRIDE + FIRST < READ:
            total += values[q * STRIDE + FIRST] * grad_out[q]
    return total


@triton.jit
def _upper_row(
    gradient,
    y,
    place,
    row,
    real,
    left,
    grad_height,
    grad_width,
    channels: tl.constexpr,
    ACROSS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """ACROSS values of a row of the gradient, and where given of y, as they are stored; 0 outside the map."""
    inside = real & ((row >= 0) & (row < grad_height))
    line = place + row * grad_width * channels
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
    place,
    source,
    row,
    stop,
    ahead,
    real,
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
    """What TOGETHER steps need from row on: of each, a row of the gradient, and of y, and STRIDE rows of x."""
    values = ()
    for step in tl.static_range(TOGETHER):
        at = row + step
        mask = real & (at < stop)
        values = values + _upper_row(
            gradient, y, place, at + ahead, mask, left, grad_height, grad_width, channels, ACROSS, EVEN
        )
        values = values + _lower_rows(
            source, at, mask, first, height, width, channels, STRIDE, ACROSS, READ, INNER, EVEN
        )
    return values


@triton.jit
def _lower_rows(
    source,
    row,
    real,
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
    """READ values of each of the STRIDE rows of x from row * STRIDE on, as they are stored; 0 outside the map."""
    values = ()
    for t in tl.static_range(STRIDE):
        line = source + (row * STRIDE + t) * width * channels
        for n in tl.static_range(READ):
            inside = real
            if not EVEN or n < INNER or n >= INNER + STRIDE * ACROSS:
                inside = real & ((first + n >= 0) & (first + n < width))[:, None]
            if not EVEN:
                inside = inside & (row * STRIDE + t < height)
            values = values + (tl.load(line + n * channels, mask=inside, other=0.0),)
    return values


@triton.jit
def _whole_row(
    values,
    completed,
    place,
    row,
    real,
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
    """A row of the gradient in fp32; with completed, what the statistics of y add included, and stored there."""
    uppers = ()
    inside = real & ((row >= 0) & (row < grad_height))
    if completed is not None:
        line = completed + (place + row * grad_width * channels)
    for q in tl.static_range(ACROSS):
        if completed is None:
            grad_out = values[q].to(tl.float32)
        else:
            within = inside
            if not EVEN:
                within = inside & (left + q < grad_width)[:, None]
            grad_out = _completed(values[q], values[ACROSS + q], slope, shift, within)
            tl.store(line + q * channels, grad_out.to(completed.dtype.element_ty), mask=within & stored)
        uppers = uppers + (grad_out,)
    return uppers


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
    """As `_strips`; a program takes TAP_ROWS kernel rows (all of them at stride 2).

    A tile is rows_each rows of COLS patches, which are counted over all samples; a patch is ACROSS columns. A thread
    keeps the DEPTH rows of the gradient under which the current row of x falls, and reads one more with each row.

    What TOGETHER rows need is read at once; if EARLY, while the rows before them are worked on. In either case before
    anything is stored: the compiler, which cannot know that these are different maps, moves no load past a store, and
    the store waits for the values that complete it, so that each of a row's loads would wait for the memory in turn.

    WHOLE: a patch is as wide as the map. EVEN: patches fill the map, and the map of x is STRIDE times as large.
    """
    pad: tl.constexpr = KERNEL // 2
    groups: tl.constexpr = (KERNEL + TAP_ROWS - 1) // TAP_ROWS
    # Kernel row i of a group meets row r * STRIDE + t of x and row r + (t + pad - i) / STRIDE of the gradient (less the
    # group's first kernel row): from `behind` rows before r on.
    behind: tl.constexpr = TAP_ROWS - 1 - pad if STRIDE == 1 else pad // STRIDE
    DEPTH: tl.constexpr = TAP_ROWS if STRIDE == 1 else pad // STRIDE + (pad + STRIDE - 1) // STRIDE + 1
    owner: tl.constexpr = pad // TAP_ROWS  # the group that passes every row of the gradient: adds the bias's sum
    skipped: tl.constexpr = pad if WHOLE else 0  # columns of x that lie outside the map
    READ: tl.constexpr = ACROSS * STRIDE if WHOLE else (ACROSS - 1) * STRIDE + KERNEL  # columns of x, of one row
    INNER: tl.constexpr = pad - skipped  # of these, the first that lies under the patch
    UPPER: tl.constexpr = ACROSS if y is None else 2 * ACROSS  # values of a row of them
    program = tl.program_id(0)
    group = program % groups
    rest = program // groups
    c = (rest % channel_tiles) * CHANNELS + tl.arange(0, CHANNELS)
    part = rest // channel_tiles
    mask = c < channels
    ahead = DEPTH - 1 - behind - group * TAP_ROWS  # the newest row of the gradient, less the row that is at work

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
        real = (sample < batch)[:, None] & mask[None, :]
        sample = sample.to(tl.int64)
        first = left * STRIDE + (skipped - pad)
        place = (sample * grad_height * grad_width + left)[:, None] * channels + c[None, :]
        source = x + ((sample * height * width + first)[:, None] * channels + c[None, :])
        begin = tl.maximum(top, -ahead)  # the rows before it, and from stop on, meet no row of the gradient
        stop = tl.minimum(tl.minimum(top + rows_each, grad_height), grad_height - ahead + DEPTH - 1)

        older = ()
        for n in tl.static_range(DEPTH - 1):
            before = begin + ahead - (DEPTH - 1) + n
            older = older + _upper_row(
                gradient, y, place, before, real, left, grad_height, grad_width, channels, ACROSS, EVEN
            )
        if EARLY:
            next_rows = _rows(
                gradient,
                y,
                place,
                source,
                begin,
                stop,
                ahead,
                real,
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
        window = ()  # rows of the gradient, the oldest first
        for n in tl.static_range(DEPTH - 1):
            before = begin + ahead - (DEPTH - 1) + n
            earlier = (before >= top) & (before < top + rows_each)
            window = window + _whole_row(
                older[n * UPPER :][:UPPER],
                completed,
                place,
                before,
                real,
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
                    place,
                    source,
                    start_row + TOGETHER,
                    stop,
                    ahead,
                    real,
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
                    place,
                    source,
                    start_row,
                    stop,
                    ahead,
                    real,
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
                own = (newest >= top) & (newest < top + rows_each) & (row < stop)
                here = rows[step * (UPPER + STRIDE * READ) :][: UPPER + STRIDE * READ]
                newer = _whole_row(
                    here,
                    completed,
                    place,
                    newest,
                    real,
                    own & (group == owner),
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
                bias_sum += tl.where(own, row_sum, 0.0)
                window = window + newer
                for t in tl.static_range(STRIDE):
                    values = ()
                    for n in tl.static_range(READ):
                        values = values + (here[UPPER + t * READ + n].to(tl.float32),)
                    new = ()  # built anew for each row: Triton's compiler is slow where a long tuple changes often
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
    """out [parts, channels, TAPS] and bias_out [parts, channels] -> their sums over the parts, in one launch."""
    block = tl.program_id(0)
    blocks = tl.cdiv(channels * TAPS, WIDE)
    if block < blocks:
        _column_sums(out, grad_weight, block, channels * TAPS, parts, ROWS, WIDE)
    else:
        _column_sums(bias_out, grad_bias, block - blocks, channels, parts, ROWS, WIDE)


@dataclass(frozen=True)
class Statistics:
    """Of the convolution's result y, whose mean and variance have gradients too: fp32 [C]."""

    y: Tensor
    mean: Tensor
    grad_mean: Tensor
    grad_var: Tensor
    completed: Tensor
    """Is filled with the whole gradient by y."""

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        """As the kernels take them."""
        return self.y, self.mean, self.grad_mean, self.grad_var, self.completed


def weight_gradient(
    gradient: Tensor, x: Tensor, *, kernel: int, stride: int, statistics: Statistics | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the gradients by weight, fp32 [C, 1, k, k], and bias, fp32 [C]. The form is `tiles.weight_gradient`'s."""
    batch, channels, height, width = x.shape
    grad_height, grad_width = gradient.shape[2:]
    form = tiles.weight_gradient(kernel, stride, grad_height, grad_width, channels)
    grid = form.grid(kernel, batch, grad_height, grad_width, channels)
    out = x.new_empty(grid.parts, channels, kernel * kernel, dtype=torch.float32)
    bias_out = x.new_empty(grid.parts, channels, dtype=torch.float32)
    launch, sizes, constants = _strips, (), {}
    if isinstance(form, tiles.Patches):
        launch, sizes, constants = _patches, (form.rows,), _fit(form, x, gradient, stride)
    launch[(grid.programs,)](
        gradient,
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
    rows, wide, warps = tiles.added_parts(grid.parts)
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


def _fit(form: tiles.Patches, x: Tensor, gradient: Tensor, stride: int) -> dict[str, bool]:
    """How patches fit the maps."""
    height, width = gradient.shape[2:]
    even = width % form.across == 0 and x.shape[2:] == (height * stride, width * stride)
    return {"WHOLE": even and form.across == width, "EVEN": even}

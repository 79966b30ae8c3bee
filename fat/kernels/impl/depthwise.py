"""Triton kernels of the depthwise convolution over channels-last feature maps and its input gradient, in two forms.

- columns (`_convolve`, `_spread`): each thread computes a column of output rows of 4 or 8 channels. An input row is
  loaded once per kernel column and used for all kernel rows, so k (rows + k - 1) / rows loads per output serve k^2
  products. The repeated loads hit the L1 cache.
- blocks (`_blocks`, `_spread_blocks`): each thread computes a block of output rows and columns of one or two channels.
  An input value is loaded and converted once, and used for all taps.

`_spread` and `_spread_blocks` compute the input gradient at stride 2, a transposed convolution. Sums are fp32 for all
dtypes. `fat.kernels.impl.tiles` chooses the form.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fat.kernels.impl import tiles
from fat.kernels.impl.tiles import Tile

PLAIN, GATE, GATE_GRADIENT, GELU_GRADIENT = 0, 1, 2, 3
_PLAIN = tl.constexpr(PLAIN)
_GATE = tl.constexpr(GATE)
_GATE_GRADIENT = tl.constexpr(GATE_GRADIENT)
_GELU_GRADIENT = tl.constexpr(GELU_GRADIENT)
# How tiles fit a feature map along one dimension. UNEVEN: a tile may extend beyond the end. EVEN: no tile does. WHOLE:
# one tile covers the feature map.
UNEVEN, EVEN, WHOLE = 0, 1, 2
_UNEVEN = tl.constexpr(UNEVEN)
_WHOLE = tl.constexpr(WHOLE)
# Only the number of channels determines the width of loads, so other sizes are not specialized on alignment. Numbers of
# tiles are specialized if they are 1, because a tile as wide as the feature map needs fewer registers (130 instead of
# 186 for the 5x5 gate gradient).
_TILES = ("row_tiles", "col_tiles", "channel_tiles")


@triton.jit(
    do_not_specialize=("height", "width", "out_height", "out_width"),
    do_not_specialize_on_alignment=_TILES,
)
def _convolve(
    x,
    taps,
    bias,
    gate,
    gradient,
    out,
    gate_out,
    stats,
    counts,
    height,
    width,
    channels,
    out_height,
    out_width,
    row_tiles,
    col_tiles,
    channel_tiles,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    FLIP: tl.constexpr,
    RESIDUAL: tl.constexpr,
    EPILOGUE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """x [B, height, width, channels], taps fp32 [KERNEL^2, channels] -> out [B, out_height, out_width, channels].

    FLIP: rotate the kernel by 180 degrees, for the input gradient at stride 1. With stats and no counts, each program
    stores the count, mean and sum of squared deviations of its outputs. With both, it stores these per channel: mean
    and sum in stats, fp32 [tiles, 2, channels], and the count in counts, fp32 [tiles].
    """
    pad: tl.constexpr = KERNEL // 2
    program = tl.program_id(0)
    c = (program % channel_tiles) * CHANNELS + tl.arange(0, CHANNELS)
    rest = program // channel_tiles
    col = (rest % col_tiles) * COLS + tl.arange(0, COLS)
    rest = rest // col_tiles
    top = (rest % row_tiles) * ROWS
    sample = (rest // row_tiles).to(tl.int64)
    x += sample * height * width * channels
    mask = c < channels

    sums = ()
    for _ in tl.static_range(ROWS):
        sums = sums + (tl.zeros((COLS, CHANNELS), tl.float32),)
    for tap_col in range(KERNEL):
        weights = ()
        for tap_row in tl.static_range(KERNEL):
            tap = tap_row * KERNEL + tap_col
            if FLIP:
                tap = KERNEL * KERNEL - 1 - tap
            weights = weights + (tl.load(taps + tap * channels + c, mask=mask, other=0.0)[None, :],)
        source_col = col * STRIDE + (tap_col - pad)
        col_mask = ((source_col >= 0) & (source_col < width))[:, None] & mask[None, :]
        offsets = source_col[:, None] * channels + c[None, :]
        for i in tl.static_range((ROWS - 1) * STRIDE + KERNEL):
            row = top * STRIDE + (i - pad)
            inside = col_mask & ((row >= 0) & (row < height))
            values = tl.load(x + row * width * channels + offsets, mask=inside, other=0.0).to(tl.float32)
            for r in tl.static_range(ROWS):
                if i - r * STRIDE >= 0 and i - r * STRIDE < KERNEL:
                    sums = sums[:r] + (sums[r] + values * weights[i - r * STRIDE],) + sums[r + 1 :]

    out += sample * out_height * out_width * channels
    out_mask = (col < out_width)[:, None] & mask[None, :]
    offsets = col[:, None] * channels + c[None, :]
    shift = tl.zeros((1, CHANNELS), tl.float32)
    if bias is not None:
        shift = tl.load(bias + c, mask=mask, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros((COLS, CHANNELS), tl.float32)
    rounded = ()
    for r in tl.static_range(ROWS):
        row = top + r
        inside = out_mask & (row < out_height)
        at = row * out_width * channels + offsets
        value = sums[r] + shift
        if RESIDUAL:
            value += tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        if EPILOGUE == _GATE or EPILOGUE == _GATE_GRADIENT:
            base = sample * out_height * out_width * channels
            other = tl.load(gate + base + at, mask=inside, other=0.0).to(tl.float32)
            value_silu = value * tl.sigmoid(value)
            other_silu = other * tl.sigmoid(other)
            if EPILOGUE == _GATE:
                value = value_silu * other_silu
            else:
                grad_out = tl.load(gradient + base + at, mask=inside, other=0.0).to(tl.float32)
                grad_other = grad_out * value_silu * (tl.sigmoid(other) * (1 + other - other_silu))
                tl.store(gate_out + base + at, grad_other.to(gate_out.dtype.element_ty), mask=inside)
                value = grad_out * other_silu * (tl.sigmoid(value) * (1 + value - value_silu))
        if EPILOGUE == _GELU_GRADIENT:
            base = sample * out_height * out_width * channels
            value *= gelu_slope(tl.load(gate + base + at, mask=inside, other=0.0).to(tl.float32))
        stored = value.to(out.dtype.element_ty)
        tl.store(out + at, stored, mask=inside)
        if stats is not None:
            kept = tl.where(inside, stored.to(tl.float32), 0.0)
            total += kept
            rounded = rounded + (kept,)
    if stats is not None:
        rows = tl.minimum(out_height - top, ROWS)
        if counts is None:
            count = rows * tl.sum(tl.sum(out_mask.to(tl.int32), axis=1), axis=0)
            mean = tl.sum(tl.sum(total, axis=1), axis=0) / count
        else:
            count = rows * tl.sum((col < out_width).to(tl.int32), axis=0)
            mean = (tl.sum(total, axis=0) / count)[None, :]
        squares = tl.zeros((COLS, CHANNELS), tl.float32)
        for r in tl.static_range(ROWS):
            deviation = tl.where(out_mask & (top + r < out_height), rounded[r] - mean, 0.0)
            squares += deviation * deviation
        if counts is None:
            slot = stats + program.to(tl.int64) * 3
            tl.store(slot, count.to(tl.float32))
            tl.store(slot + 1, mean)
            tl.store(slot + 2, tl.sum(tl.sum(squares, axis=1), axis=0))
        else:
            tile = (program // channel_tiles).to(tl.int64)
            slot = stats + tile * 2 * channels + c
            tl.store(slot, tl.sum(mean, axis=0), mask=mask)
            tl.store(slot + channels, tl.sum(squares, axis=0), mask=mask)
            tl.store(counts + tile, count.to(tl.float32))


@triton.jit
def _repeated(value, COUNT: tl.constexpr):
    values = ()
    for _ in tl.static_range(COUNT):
        values = values + (value,)
    return values


@triton.jit
def _read(line, inside, left, width, channels: tl.constexpr, ACROSS: tl.constexpr, COLUMNS_FIT: tl.constexpr):
    """Load ACROSS adjacent values of a row of a feature map."""
    values = ()
    for q in tl.static_range(ACROSS):
        within = inside
        if COLUMNS_FIT == 0:  # 0 is UNEVEN: a global constant would change cache keys (see attention.py)
            within = within & (left + q < width)[:, None]
        values = values + (tl.load(line + q * channels, mask=within, other=0.0),)
    return values


@triton.jit(
    do_not_specialize=("height", "width", "out_height", "out_width"),
    do_not_specialize_on_alignment=_TILES,
)
def _blocks(
    x,
    taps,
    bias,
    gate,
    gradient,
    out,
    gate_out,
    stats,
    counts,
    height,
    width,
    channels: tl.constexpr,
    out_height,
    out_width,
    row_tiles,
    col_tiles,
    channel_tiles,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    FLIP: tl.constexpr,
    RESIDUAL: tl.constexpr,
    EPILOGUE: tl.constexpr,
    ROWS: tl.constexpr,
    ACROSS: tl.constexpr,
    COLS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS_FIT: tl.constexpr,
    COLUMNS_FIT: tl.constexpr,
):
    """Like `_convolve`, but a thread computes ROWS x ACROSS outputs of one or two channels. A tile has COLS such blocks
    next to each other.

    All loops are unrolled: each value of x is loaded and converted once for all taps and outputs, weights stay in
    registers, and addresses differ by constants. Elements outside the feature map are not loaded if this is known at
    compile time (ROWS_FIT, COLUMNS_FIT), and masked otherwise.
    """
    pad: tl.constexpr = KERNEL // 2
    program = tl.program_id(0)
    c = (program % channel_tiles) * CHANNELS + tl.arange(0, CHANNELS)
    rest = program // channel_tiles
    left = ((rest % col_tiles) * COLS + tl.arange(0, COLS)) * ACROSS
    rest = rest // col_tiles
    top = (rest % row_tiles) * ROWS
    sample = (rest // row_tiles).to(tl.int64)
    mask = tl.full((1, CHANNELS), True, tl.int1) if channels % CHANNELS == 0 else (c < channels)[None, :]
    spread = tl.zeros((COLS, 1), tl.int32)  # broadcasts the loads of one value per channel to the shape of a tile

    weights = ()
    for t in tl.static_range(KERNEL * KERNEL):
        tap = KERNEL * KERNEL - 1 - t if FLIP else t
        weight = tl.load(taps + tap * channels + (c[None, :] + spread), mask=mask, other=0.0)
        if RESIDUAL and t == KERNEL * KERNEL // 2:
            weight += 1.0  # the center weight adds x to the result
        weights = weights + (weight,)
    shift = tl.zeros((COLS, CHANNELS), tl.float32)
    if bias is not None:
        shift = tl.load(bias + (c[None, :] + spread), mask=mask, other=0.0).to(tl.float32)
    sums = _repeated(shift, ROWS * ACROSS)

    base = sample * out_height * out_width * channels
    start = left[:, None] * channels + c[None, :]
    next_others, next_grads = _repeated(0.0, 0), _repeated(0.0, 0)
    under = mask & (top < out_height)
    if EPILOGUE != _PLAIN:
        after = base + top * out_width * channels + start
        next_others = _read(gate + after, under, left, out_width, channels, ACROSS, COLUMNS_FIT)
    if EPILOGUE == _GATE_GRADIENT:
        after = base + top * out_width * channels + start
        next_grads = _read(gradient + after, under, left, out_width, channels, ACROSS, COLUMNS_FIT)

    source = x + sample * height * width * channels
    first = (left * STRIDE - pad)[:, None] * channels + c[None, :]
    for i in tl.static_range((ROWS - 1) * STRIDE + KERNEL):
        # If one tile covers the feature map, rows and columns outside contribute nothing.
        if ROWS_FIT < _WHOLE or (i >= pad and i < pad + ROWS * STRIDE):
            row = top * STRIDE + (i - pad)
            line = source + row * width * channels + first
            values = ()
            for j in tl.static_range((ACROSS - 1) * STRIDE + KERNEL):
                inside = mask
                if ROWS_FIT == _UNEVEN or i < pad or i >= pad + ROWS * STRIDE:
                    inside = inside & ((row >= 0) & (row < height))
                if COLUMNS_FIT == _UNEVEN or j < pad or j >= pad + ACROSS * STRIDE:
                    column = left * STRIDE + (j - pad)
                    inside = inside & ((column >= 0) & (column < width))[:, None]
                if COLUMNS_FIT == _WHOLE and (j < pad or j >= pad + ACROSS * STRIDE):
                    values = values + (0.0,)
                else:
                    values = values + (tl.load(line + j * channels, mask=inside, other=0.0).to(tl.float32),)
            new = ()  # a new tuple per row: Triton's compiler is slow if elements of a long tuple are replaced often
            for r in tl.static_range(ROWS):
                for q in tl.static_range(ACROSS):
                    total = sums[r * ACROSS + q]
                    if i - r * STRIDE >= 0 and i - r * STRIDE < KERNEL:
                        for j in tl.static_range(KERNEL):
                            if COLUMNS_FIT < _WHOLE or (
                                q * STRIDE + j >= pad and q * STRIDE + j < pad + ACROSS * STRIDE
                            ):
                                total = tl.fma(values[q * STRIDE + j], weights[(i - r * STRIDE) * KERNEL + j], total)
                    new = new + (total,)
            sums = new

    total = tl.zeros((COLS, CHANNELS), tl.float32)
    rounded = ()
    for r in tl.static_range(ROWS):
        row = top + r
        line = base + row * out_width * channels + start
        out_line = out + line
        others, grads = next_others, next_grads
        # Load the next row before storing this one: the compiler does not move a load before a store.
        if r + 1 < ROWS:
            under = mask & (row + 1 < out_height) if ROWS_FIT == _UNEVEN else mask
            after = line + out_width * channels
            if EPILOGUE != _PLAIN:
                next_others = _read(gate + after, under, left, out_width, channels, ACROSS, COLUMNS_FIT)
            if EPILOGUE == _GATE_GRADIENT:
                next_grads = _read(gradient + after, under, left, out_width, channels, ACROSS, COLUMNS_FIT)
        for q in tl.static_range(ACROSS):
            inside = mask
            if ROWS_FIT == _UNEVEN:
                inside = inside & (row < out_height)
            if COLUMNS_FIT == _UNEVEN:
                inside = inside & (left + q < out_width)[:, None]
            value = sums[r * ACROSS + q]
            if EPILOGUE == _GATE or EPILOGUE == _GATE_GRADIENT:
                other = others[q].to(tl.float32)
                value_silu = value * tl.sigmoid(value)
                other_silu = other * tl.sigmoid(other)
                if EPILOGUE == _GATE:
                    value = value_silu * other_silu
                else:
                    grad_out = grads[q].to(tl.float32)
                    grad_other = grad_out * value_silu * (tl.sigmoid(other) * (1 + other - other_silu))
                    tl.store(gate_out + line + q * channels, grad_other.to(gate_out.dtype.element_ty), mask=inside)
                    value = grad_out * other_silu * (tl.sigmoid(value) * (1 + value - value_silu))
            if EPILOGUE == _GELU_GRADIENT:
                value *= gelu_slope(others[q].to(tl.float32))
            stored = value.to(out.dtype.element_ty)
            tl.store(out_line + q * channels, stored, mask=inside)
            if stats is not None:
                kept = tl.where(inside, stored.to(tl.float32), 0.0)
                total += kept
                rounded = rounded + (kept,)
    if stats is not None:
        rows = tl.minimum(out_height - top, ROWS)
        columns = tl.sum(tl.minimum(tl.maximum(out_width - left, 0), ACROSS), axis=0)
        count = rows * columns
        if counts is None:
            count *= tl.sum((c < channels).to(tl.int32), axis=0)
            mean = tl.sum(tl.sum(total, axis=1), axis=0) / count
        else:
            mean = (tl.sum(total, axis=0) / count)[None, :]
        squares = tl.zeros((COLS, CHANNELS), tl.float32)
        for r in tl.static_range(ROWS):
            for q in tl.static_range(ACROSS):
                inside = (c < channels)[None, :] & (left + q < out_width)[:, None] & (top + r < out_height)
                deviation = tl.where(inside, rounded[r * ACROSS + q] - mean, 0.0)
                squares += deviation * deviation
        if counts is None:
            slot = stats + program.to(tl.int64) * 3
            tl.store(slot, count.to(tl.float32))
            tl.store(slot + 1, mean)
            tl.store(slot + 2, tl.sum(tl.sum(squares, axis=1), axis=0))
        else:
            tile = (program // channel_tiles).to(tl.int64)
            slot = stats + tile * 2 * channels + c
            tl.store(slot, tl.sum(mean, axis=0), mask=c < channels)
            tl.store(slot + channels, tl.sum(squares, axis=0), mask=c < channels)
            tl.store(counts + tile, count.to(tl.float32))


@triton.jit
def gelu_slope(x):
    """Derivative of GELU, x times the normal distribution function, in fp32 with an error below 1e-7.

    The distribution's tail is computed by formula 7.1.26 of Abramowitz and Stegun. It uses the same exponential as the
    density, and so takes half as many instructions as erf and exp.
    """
    bell = tl.exp(-0.5 * x * x)
    t = 1.0 / (1.0 + 0.23164189 * tl.abs(x))
    tail = t * (0.12741480 + t * (-0.14224837 + t * (0.71070687 + t * (-0.72657601 + t * 0.53070271)))) * bell
    return tl.where(x > 0, 1.0 - tail, tail) + x * bell * 0.3989422804014327


@triton.jit(
    do_not_specialize=("height", "width", "grad_height", "grad_width"),
    do_not_specialize_on_alignment=_TILES,
)
def _spread(
    gradient,
    taps,
    before,
    out,
    height,
    width,
    channels,
    grad_height,
    grad_width,
    row_tiles,
    col_tiles,
    channel_tiles,
    KERNEL: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Input gradient of a stride-2 convolution. A program computes outputs with one parity of row and column, to which
    every second kernel row and column contributes, as a stride-1 convolution of the gradient.

    Output row 2 a + p is the sum over kernel rows t = t0 + 2 m of gradient row a + d - m, with t0 = (p + pad) mod 2 and
    d = (p + pad - t0) / 2. With `before`, the input is GELU(before), and the gradient of `before` is computed.
    """
    pad: tl.constexpr = KERNEL // 2
    half: tl.constexpr = (KERNEL + 1) // 2
    program = tl.program_id(0)
    c = (program % channel_tiles) * CHANNELS + tl.arange(0, CHANNELS)
    rest = program // channel_tiles
    col_parity = rest % 2
    rest = rest // 2
    row_parity = rest % 2
    rest = rest // 2
    a = (rest % col_tiles) * COLS + tl.arange(0, COLS)
    rest = rest // col_tiles
    top = (rest % row_tiles) * ROWS
    sample = (rest // row_tiles).to(tl.int64)
    gradient += sample * grad_height * grad_width * channels
    mask = c < channels
    row_tap = (row_parity + pad) % 2
    col_tap = (col_parity + pad) % 2
    row_shift = (row_parity + pad - row_tap) // 2
    col_shift = (col_parity + pad - col_tap) // 2

    sums = ()
    for _ in tl.static_range(ROWS):
        sums = sums + (tl.zeros((COLS, CHANNELS), tl.float32),)
    for n in range(half):
        tap_col = col_tap + 2 * n
        weights = ()
        for m in tl.static_range(half):
            tap_row = row_tap + 2 * m
            valid = mask & (tap_row < KERNEL) & (tap_col < KERNEL)
            weights = weights + (tl.load(taps + (tap_row * KERNEL + tap_col) * channels + c, mask=valid, other=0.0),)
        source_col = a + (col_shift - n)
        col_mask = ((source_col >= 0) & (source_col < grad_width))[:, None] & mask[None, :]
        offsets = source_col[:, None] * channels + c[None, :]
        for i in tl.static_range(ROWS + half - 1):
            row = top + row_shift + (i - (half - 1))
            inside = col_mask & ((row >= 0) & (row < grad_height))
            values = tl.load(gradient + row * grad_width * channels + offsets, mask=inside, other=0.0).to(tl.float32)
            for r in tl.static_range(ROWS):
                if r + half - 1 - i >= 0 and r + half - 1 - i < half:
                    sums = sums[:r] + (sums[r] + values * weights[r + half - 1 - i][None, :],) + sums[r + 1 :]

    base = sample * height * width * channels
    col = 2 * a + col_parity
    for r in tl.static_range(ROWS):
        row = 2 * (top + r) + row_parity
        inside = (col < width)[:, None] & mask[None, :] & (row < height)
        at = row * width * channels + col[:, None] * channels + c[None, :]
        if before is not None:
            slope = gelu_slope(tl.load(before + base + at, mask=inside, other=0.0).to(tl.float32))
            sums = sums[:r] + (sums[r] * slope,) + sums[r + 1 :]
        tl.store(out + base + at, sums[r].to(out.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=("height", "width", "grad_height", "grad_width"),
    do_not_specialize_on_alignment=_TILES,
)
def _spread_blocks(
    gradient,
    taps,
    before,
    out,
    height,
    width,
    channels: tl.constexpr,
    grad_height,
    grad_width,
    row_tiles,
    col_tiles,
    channel_tiles,
    KERNEL: tl.constexpr,
    ROWS: tl.constexpr,
    ACROSS: tl.constexpr,
    COLS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS_FIT: tl.constexpr,
    COLUMNS_FIT: tl.constexpr,
):
    """Like `_spread`, but a thread computes the 2 ROWS x 2 ACROSS outputs of ROWS x ACROSS positions of the gradient.
    Output row o is the sum over gradient rows g, with kernel row o + pad - 2 g."""
    pad: tl.constexpr = KERNEL // 2
    above: tl.constexpr = pad // 2  # number of gradient rows above a block that contribute to it
    more: tl.constexpr = pad // 2 + (pad + 1) // 2  # number of contributing gradient rows above and below a block
    program = tl.program_id(0)
    c = (program % channel_tiles) * CHANNELS + tl.arange(0, CHANNELS)
    rest = program // channel_tiles
    left = ((rest % col_tiles) * COLS + tl.arange(0, COLS)) * ACROSS
    rest = rest // col_tiles
    top = (rest % row_tiles) * ROWS
    sample = (rest // row_tiles).to(tl.int64)
    mask = tl.full((1, CHANNELS), True, tl.int1) if channels % CHANNELS == 0 else (c < channels)[None, :]
    each = c[None, :] + tl.zeros((COLS, 1), tl.int32)

    weights = ()
    for t in tl.static_range(KERNEL * KERNEL):
        weights = weights + (tl.load(taps + t * channels + each, mask=mask, other=0.0),)
    sums = _repeated(tl.zeros((COLS, CHANNELS), tl.float32), 4 * ROWS * ACROSS)

    base = sample * height * width * channels
    start = (2 * left)[:, None] * channels + each
    following = _repeated(0.0, 0)
    if before is not None:
        under = mask & (2 * top < height)
        line = before + base + 2 * top * width * channels + start
        following = _read(line, under, 2 * left, width, channels, 2 * ACROSS, COLUMNS_FIT)

    source = gradient + sample * grad_height * grad_width * channels
    first = (left - above)[:, None] * channels + each
    for i in tl.static_range(ROWS + more):
        if ROWS_FIT < _WHOLE or (i >= above and i < above + ROWS):
            row = top + (i - above)
            line = source + row * grad_width * channels + first
            values = ()
            for j in tl.static_range(ACROSS + more):
                inside = mask
                if ROWS_FIT == _UNEVEN or i < above or i >= above + ROWS:
                    inside = inside & ((row >= 0) & (row < grad_height))
                if COLUMNS_FIT == _UNEVEN or j < above or j >= above + ACROSS:
                    column = left + (j - above)
                    inside = inside & ((column >= 0) & (column < grad_width))[:, None]
                if COLUMNS_FIT == _WHOLE and (j < above or j >= above + ACROSS):
                    values = values + (0.0,)
                else:
                    values = values + (tl.load(line + j * channels, mask=inside, other=0.0).to(tl.float32),)
            new = ()
            for r in tl.static_range(2 * ROWS):
                for q in tl.static_range(2 * ACROSS):
                    total = sums[r * 2 * ACROSS + q]
                    if r + pad - 2 * (i - above) >= 0 and r + pad - 2 * (i - above) < KERNEL:
                        for j in tl.static_range(ACROSS + more):
                            if (
                                (COLUMNS_FIT < _WHOLE or (j >= above and j < above + ACROSS))
                                and q + pad - 2 * (j - above) >= 0
                                and q + pad - 2 * (j - above) < KERNEL
                            ):
                                total = tl.fma(
                                    values[j],
                                    weights[(r + pad - 2 * (i - above)) * KERNEL + q + pad - 2 * (j - above)],
                                    total,
                                )
                    new = new + (total,)
            sums = new

    for r in tl.static_range(2 * ROWS):
        row = 2 * top + r
        line = base + row * width * channels + start
        out_line = out + line
        others = following
        if before is not None and r + 1 < 2 * ROWS:
            under = mask & (row + 1 < height) if ROWS_FIT == _UNEVEN else mask
            following = _read(
                before + line + width * channels, under, 2 * left, width, channels, 2 * ACROSS, COLUMNS_FIT
            )
        for q in tl.static_range(2 * ACROSS):
            inside = mask
            if ROWS_FIT == _UNEVEN:
                inside = inside & (row < height)
            if COLUMNS_FIT == _UNEVEN:
                inside = inside & (2 * left + q < width)[:, None]
            value = sums[r * 2 * ACROSS + q]
            if before is not None:
                value *= gelu_slope(others[q].to(tl.float32))
            tl.store(out_line + q * channels, value.to(out.dtype.element_ty), mask=inside)


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    stride: int = 1,
    flip: bool = False,
    residual: bool = False,
    epilogue: int = PLAIN,
    gate: Tensor | None = None,
    grad_out: Tensor | None = None,
    gate_out: Tensor | None = None,
    stats: Tensor | None = None,
    counts: Tensor | None = None,
) -> None:
    """Compute a depthwise convolution into `out`.

    Args:
        flip: rotate the kernel by 180 degrees.
        residual: add x.
        epilogue: PLAIN, or an operation on the result: GATE: multiply by SiLU(gate) after SiLU. GATE_GRADIENT: compute
            the gradient of the gate's two inputs, from grad_out, into `out` and `gate_out`. GELU_GRADIENT: multiply by
            the derivative of GELU at `gate`.
        stats, counts: receive partial statistics of the result: stats fp32 [B, programs, 3] if counts is None, else
            stats fp32 [tiles, 2, C] and counts fp32 [tiles]. `tile_counts` returns these numbers.
    """
    batch, channels, height, width = x.shape
    out_height, out_width = out.shape[2:]
    tile = tiles.depthwise(weight.shape[-1], out_height, out_width, channels, stride)
    grid = _grid(tile, out_height, out_width, channels)
    kernel, constants = _convolve, {}
    if isinstance(tile, tiles.Blocks):
        kernel, constants = (
            _blocks,
            {
                "ACROSS": tile.across,
                "ROWS_FIT": _fit(tile.rows, out_height, height, stride),
                "COLUMNS_FIT": _fit(tile.cols * tile.across, out_width, width, stride, tile.across),
            },
        )
    kernel[(batch * grid[0] * grid[1] * grid[2],)](
        x,
        _taps(weight),
        bias,
        gate,
        grad_out,
        out,
        gate_out,
        stats,
        counts,
        height,
        width,
        channels,
        out_height,
        out_width,
        *grid,
        KERNEL=weight.shape[-1],
        STRIDE=stride,
        FLIP=flip,
        RESIDUAL=residual,
        EPILOGUE=epilogue,
        ROWS=tile.rows,
        COLS=tile.cols,
        CHANNELS=tile.channels,
        **constants,
        num_warps=tile.warps,
    )


def tile_counts(weight: Tensor, out: Tensor, stride: int = 1) -> tuple[int, int]:
    """Return the numbers of tiles per sample of `out` and of programs per tile, each for some of the channels."""
    height, width = out.shape[2:]
    tile = tiles.depthwise(weight.shape[-1], height, width, out.shape[1], stride)
    row_tiles, col_tiles, channel_tiles = _grid(tile, height, width, out.shape[1])
    return row_tiles * col_tiles, channel_tiles


def input_gradient(
    grad_out: Tensor, weight: Tensor, gelu_input: Tensor | None, out: Tensor, *, stride: int, residual: bool
) -> None:
    """Compute the input gradient of a depthwise convolution into `out`, which has the shape of its input.

    gelu_input: if the convolution's input is GELU(gelu_input), compute the gradient of gelu_input instead.
    """
    if stride == 1:
        epilogue = PLAIN if gelu_input is None else GELU_GRADIENT
        convolve(grad_out, weight, None, out, flip=True, residual=residual, epilogue=epilogue, gate=gelu_input)
        return
    batch, channels, height, width = out.shape
    grad_height, grad_width = grad_out.shape[2:]
    tile = tiles.spread(weight.shape[-1], -(-height // 2), -(-width // 2), channels)
    grid = _grid(tile, -(-height // 2), -(-width // 2), channels)
    kernel, constants, parities = _spread, {}, 4
    if isinstance(tile, tiles.Blocks):
        kernel, parities = _spread_blocks, 1
        constants = {
            "ACROSS": tile.across,
            "ROWS_FIT": _fit(tile.rows, grad_height, height, 2),
            "COLUMNS_FIT": _fit(tile.cols * tile.across, grad_width, width, 2, tile.across),
        }
    kernel[(parities * batch * grid[0] * grid[1] * grid[2],)](
        grad_out,
        _taps(weight),
        gelu_input,
        out,
        height,
        width,
        channels,
        grad_height,
        grad_width,
        *grid,
        KERNEL=weight.shape[-1],
        ROWS=tile.rows,
        COLS=tile.cols,
        CHANNELS=tile.channels,
        **constants,
        num_warps=tile.warps,
    )


def _grid(tile: Tile, height: int, width: int, channels: int) -> tuple[int, int, int]:
    """Return the number of tiles along rows, columns and channels."""
    wide = tile.cols * tile.across if isinstance(tile, tiles.Blocks) else tile.cols
    return triton.cdiv(height, tile.rows), triton.cdiv(width, wide), triton.cdiv(channels, tile.channels)


def _fit(tile: int, length: int, source: int, stride: int, block: int | None = None) -> int:
    """Return how tiles fit a feature map with `length` rows or columns that is computed from one with `source`."""
    if length % tile or source != length * stride:
        return UNEVEN
    return WHOLE if length == (block or tile) else EVEN


def _taps(weight: Tensor) -> Tensor:
    """Convert depthwise weights [C, 1, k, k] to fp32 [k^2, C], so that adjacent threads, which compute adjacent
    channels, load adjacent numbers."""
    return weight.detach().flatten(1).t().to(torch.float32, memory_format=torch.contiguous_format).contiguous()

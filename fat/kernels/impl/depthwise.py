"""Triton: depthwise convolution over channels-last maps, and its gradient by the input, in two forms each.

- columns (`_convolve`, `_spread`): each thread holds a column of output rows of 4 or 8 channels. A row of the input
  that has been read is used for every kernel row that it falls under, so k (rows + k - 1) / rows reads serve k^2
  products; it is read again, from the first cache, for every kernel column;
- blocks (`_blocks`, `_spread_blocks`): each thread holds some rows by some columns of outputs of one or two channels. A
  value that has been read and converted is used for every tap that it falls under.

Sums are in fp32 whatever the maps are. `fat.kernels.impl.tiles` chooses the form.
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
# How tiles fit a map along one direction: some may overlap its end, none does, one is as large as the map.
UNEVEN, EVEN, WHOLE = 0, 1, 2
_UNEVEN = tl.constexpr(UNEVEN)
_WHOLE = tl.constexpr(WHOLE)
# Of the sizes only the number of channels decides how wide a load can be. Numbers of tiles are specialised where they
# are 1: a tile that is as wide as the map takes fewer registers (gate's gradient, 5x5: 130 instead of 186).
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
    moments,
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

    FLIP turns the kernel round (the gradient by the input at stride 1). moments, where given, gets (count, mean, sum of
    squared deviations) of each program's outputs; with counts, those of each channel: moments (mean, squares) fp32
    [tiles, 2, channels], counts fp32 [tiles].
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
        here = ((source_col >= 0) & (source_col < width))[:, None] & mask[None, :]
        offsets = source_col[:, None] * channels + c[None, :]
        for i in tl.static_range((ROWS - 1) * STRIDE + KERNEL):
            row = top * STRIDE + (i - pad)
            inside = here & ((row >= 0) & (row < height))
            values = tl.load(x + row * width * channels + offsets, mask=inside, other=0.0).to(tl.float32)
            for r in tl.static_range(ROWS):
                if i - r * STRIDE >= 0 and i - r * STRIDE < KERNEL:
                    sums = sums[:r] + (sums[r] + values * weights[i - r * STRIDE],) + sums[r + 1 :]

    out += sample * out_height * out_width * channels
    known_here = (col < out_width)[:, None] & mask[None, :]
    offsets = col[:, None] * channels + c[None, :]
    shift = tl.zeros((1, CHANNELS), tl.float32)
    if bias is not None:
        shift = tl.load(bias + c, mask=mask, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros((COLS, CHANNELS), tl.float32)
    rounded = ()
    for r in tl.static_range(ROWS):
        row = top + r
        inside = known_here & (row < out_height)
        place = row * out_width * channels + offsets
        value = sums[r] + shift
        if RESIDUAL:
            value += tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        if EPILOGUE == _GATE or EPILOGUE == _GATE_GRADIENT:
            base = sample * out_height * out_width * channels
            other = tl.load(gate + base + place, mask=inside, other=0.0).to(tl.float32)
            own = value * tl.sigmoid(value)
            others = other * tl.sigmoid(other)
            if EPILOGUE == _GATE:
                value = own * others
            else:
                grad_out = tl.load(gradient + base + place, mask=inside, other=0.0).to(tl.float32)
                slope = tl.sigmoid(other) * (1 + other - others)
                tl.store(gate_out + base + place, (grad_out * own * slope).to(gate_out.dtype.element_ty), mask=inside)
                value = grad_out * others * (tl.sigmoid(value) * (1 + value - own))
        if EPILOGUE == _GELU_GRADIENT:
            base = sample * out_height * out_width * channels
            value *= gelu_slope(tl.load(gate + base + place, mask=inside, other=0.0).to(tl.float32))
        stored = value.to(out.dtype.element_ty)
        tl.store(out + place, stored, mask=inside)
        if moments is not None:
            kept = tl.where(inside, stored.to(tl.float32), 0.0)
            total += kept
            rounded = rounded + (kept,)
    if moments is not None:
        rows = tl.minimum(out_height - top, ROWS)
        if counts is None:
            count = rows * tl.sum(tl.sum(known_here.to(tl.int32), axis=1), axis=0)
            mean = tl.sum(tl.sum(total, axis=1), axis=0) / count
        else:
            count = rows * tl.sum((col < out_width).to(tl.int32), axis=0)
            mean = (tl.sum(total, axis=0) / count)[None, :]
        squares = tl.zeros((COLS, CHANNELS), tl.float32)
        for r in tl.static_range(ROWS):
            deviation = tl.where(known_here & (top + r < out_height), rounded[r] - mean, 0.0)
            squares += deviation * deviation
        if counts is None:
            slot = moments + program.to(tl.int64) * 3
            tl.store(slot, count.to(tl.float32))
            tl.store(slot + 1, mean)
            tl.store(slot + 2, tl.sum(tl.sum(squares, axis=1), axis=0))
        else:
            tile = (program // channel_tiles).to(tl.int64)
            slot = moments + tile * 2 * channels + c
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
    """ACROSS neighbouring values of a row of a map."""
    values = ()
    for q in tl.static_range(ACROSS):
        here = inside
        if COLUMNS_FIT == 0:  # UNEVEN; why not its name: see attention.py
            here = here & (left + q < width)[:, None]
        values = values + (tl.load(line + q * channels, mask=here, other=0.0),)
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
    moments,
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
    """As `_convolve`; a thread has ROWS x ACROSS outputs of one channel or two, and COLS such blocks lie side by side.

    All is unrolled: a value of x that has been read and converted serves every tap and output that it falls under, the
    weights stay in registers, and addresses differ by constants. What lies outside the map is not read where that is
    known at compile time (ROWS_FIT, COLUMNS_FIT), and masked where it may be.
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
    spread = tl.zeros((COLS, 1), tl.int32)  # gives what is read for each channel the shape of a tile

    weights = ()
    for t in tl.static_range(KERNEL * KERNEL):
        tap = KERNEL * KERNEL - 1 - t if FLIP else t
        weight = tl.load(taps + tap * channels + (c[None, :] + spread), mask=mask, other=0.0)
        if RESIDUAL and t == KERNEL * KERNEL // 2:
            weight += 1.0  # x itself
        weights = weights + (weight,)
    shift = tl.zeros((COLS, CHANNELS), tl.float32)
    if bias is not None:
        shift = tl.load(bias + (c[None, :] + spread), mask=mask, other=0.0).to(tl.float32)
    sums = _repeated(shift, ROWS * ACROSS)

    base = sample * out_height * out_width * channels
    start = left[:, None] * channels + c[None, :]
    next_others, next_uppers = _repeated(0.0, 0), _repeated(0.0, 0)
    under = mask & (top < out_height)
    if EPILOGUE != _PLAIN:
        after = base + top * out_width * channels + start
        next_others = _read(gate + after, under, left, out_width, channels, ACROSS, COLUMNS_FIT)
    if EPILOGUE == _GATE_GRADIENT:
        after = base + top * out_width * channels + start
        next_uppers = _read(gradient + after, under, left, out_width, channels, ACROSS, COLUMNS_FIT)

    source = x + sample * height * width * channels
    first = (left * STRIDE - pad)[:, None] * channels + c[None, :]
    for i in tl.static_range((ROWS - 1) * STRIDE + KERNEL):
        # Of the rows and columns of a whole map, those outside add nothing.
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
            new = ()  # built anew for each row: Triton's compiler is slow where a long tuple changes often
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
        others, uppers = next_others, next_uppers
        # Read before anything is written: a read does not pass a write in front of it.
        if r + 1 < ROWS:
            under = mask & (row + 1 < out_height) if ROWS_FIT == _UNEVEN else mask
            after = line + out_width * channels
            if EPILOGUE != _PLAIN:
                next_others = _read(gate + after, under, left, out_width, channels, ACROSS, COLUMNS_FIT)
            if EPILOGUE == _GATE_GRADIENT:
                next_uppers = _read(gradient + after, under, left, out_width, channels, ACROSS, COLUMNS_FIT)
        for q in tl.static_range(ACROSS):
            inside = mask
            if ROWS_FIT == _UNEVEN:
                inside = inside & (row < out_height)
            if COLUMNS_FIT == _UNEVEN:
                inside = inside & (left + q < out_width)[:, None]
            value = sums[r * ACROSS + q]
            if EPILOGUE == _GATE or EPILOGUE == _GATE_GRADIENT:
                other = others[q].to(tl.float32)
                own = value * tl.sigmoid(value)
                gated = other * tl.sigmoid(other)
                if EPILOGUE == _GATE:
                    value = own * gated
                else:
                    grad_out = uppers[q].to(tl.float32)
                    slope = tl.sigmoid(other) * (1 + other - gated)
                    grad_gate = (grad_out * own * slope).to(gate_out.dtype.element_ty)
                    tl.store(gate_out + line + q * channels, grad_gate, mask=inside)
                    value = grad_out * gated * (tl.sigmoid(value) * (1 + value - own))
            if EPILOGUE == _GELU_GRADIENT:
                value *= gelu_slope(others[q].to(tl.float32))
            stored = value.to(out.dtype.element_ty)
            tl.store(out_line + q * channels, stored, mask=inside)
            if moments is not None:
                kept = tl.where(inside, stored.to(tl.float32), 0.0)
                total += kept
                rounded = rounded + (kept,)
    if moments is not None:
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
            slot = moments + program.to(tl.int64) * 3
            tl.store(slot, count.to(tl.float32))
            tl.store(slot + 1, mean)
            tl.store(slot + 2, tl.sum(tl.sum(squares, axis=1), axis=0))
        else:
            tile = (program // channel_tiles).to(tl.int64)
            slot = moments + tile * 2 * channels + c
            tl.store(slot, tl.sum(mean, axis=0), mask=c < channels)
            tl.store(slot + channels, tl.sum(squares, axis=0), mask=c < channels)
            tl.store(counts + tile, count.to(tl.float32))


@triton.jit
def gelu_slope(x):
    """The derivative of x times the normal distribution's function, fp32, to 1e-7.

    The distribution's tail by formula 7.1.26 of Abramowitz and Stegun, which takes the same exponential as its density:
    half of the instructions of erf and exp.
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
    """The gradient by the input of a stride-2 convolution, gathered: a program writes outputs of one parity of row and
    column, under which every second kernel row and column falls, as a stride-1 convolution of the gradient.

    Output row 2 a + p takes kernel row t = t0 + 2 m from gradient row a + d - m, with t0 = (p + pad) mod 2 and
    d = (p + pad - t0) / 2. Where the input is the GELU of `before`, the gradient by that.
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
            real = mask & (tap_row < KERNEL) & (tap_col < KERNEL)
            weights = weights + (tl.load(taps + (tap_row * KERNEL + tap_col) * channels + c, mask=real, other=0.0),)
        source_col = a + (col_shift - n)
        here = ((source_col >= 0) & (source_col < grad_width))[:, None] & mask[None, :]
        offsets = source_col[:, None] * channels + c[None, :]
        for i in tl.static_range(ROWS + half - 1):
            row = top + row_shift + (i - (half - 1))
            inside = here & ((row >= 0) & (row < grad_height))
            values = tl.load(gradient + row * grad_width * channels + offsets, mask=inside, other=0.0).to(tl.float32)
            for r in tl.static_range(ROWS):
                if r + half - 1 - i >= 0 and r + half - 1 - i < half:
                    sums = sums[:r] + (sums[r] + values * weights[r + half - 1 - i][None, :],) + sums[r + 1 :]

    base = sample * height * width * channels
    col = 2 * a + col_parity
    for r in tl.static_range(ROWS):
        row = 2 * (top + r) + row_parity
        inside = (col < width)[:, None] & mask[None, :] & (row < height)
        place = row * width * channels + col[:, None] * channels + c[None, :]
        if before is not None:
            slope = gelu_slope(tl.load(before + base + place, mask=inside, other=0.0).to(tl.float32))
            sums = sums[:r] + (sums[r] * slope,) + sums[r + 1 :]
        tl.store(out + base + place, sums[r].to(out.dtype.element_ty), mask=inside)


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
    """As `_spread`, by threads that have what lies under ROWS x ACROSS positions of the gradient: 2 ROWS x 2 ACROSS
    outputs. Output row o takes kernel row o + pad - 2 g from gradient row g."""
    pad: tl.constexpr = KERNEL // 2
    above: tl.constexpr = pad // 2  # rows of the gradient before a block that reach into it
    more: tl.constexpr = pad // 2 + (pad + 1) // 2
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
    gradient: Tensor | None = None,
    gate_out: Tensor | None = None,
    moments: Tensor | None = None,
    counts: Tensor | None = None,
) -> None:
    """Fills `out` (and `gate_out`), and `moments`: fp32 [B, programs, 3], or with `counts` [tiles] [tiles, 2, C], their
    numbers by `programs`."""
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
        gradient,
        out,
        gate_out,
        moments,
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


def programs(weight: Tensor, out: Tensor, stride: int = 1) -> tuple[int, int]:
    """Count, over one sample of `out`, tiles, and programs of each, which have some of the channels."""
    height, width = out.shape[2:]
    tile = tiles.depthwise(weight.shape[-1], height, width, out.shape[1], stride)
    rows, cols, deep = _grid(tile, height, width, out.shape[1])
    return rows * cols, deep


def input_gradient(
    gradient: Tensor, weight: Tensor, before: Tensor | None, out: Tensor, *, stride: int, residual: bool
) -> None:
    """Fills `out`, shaped as the convolution's input; where that is the GELU of `before`, with the gradient by that."""
    if stride == 1:
        epilogue = PLAIN if before is None else GELU_GRADIENT
        convolve(gradient, weight, None, out, flip=True, residual=residual, epilogue=epilogue, gate=before)
        return
    batch, channels, height, width = out.shape
    grad_height, grad_width = gradient.shape[2:]
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
        gradient,
        _taps(weight),
        before,
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
    """Tiles along rows, columns and channels."""
    wide = tile.cols * tile.across if isinstance(tile, tiles.Blocks) else tile.cols
    return triton.cdiv(height, tile.rows), triton.cdiv(width, wide), triton.cdiv(channels, tile.channels)


def _fit(tile: int, length: int, source: int, stride: int, block: int | None = None) -> int:
    """How tiles fit a map of `length` along one direction, which is made from one of length `source`."""
    if length % tile or source != length * stride:
        return UNEVEN
    return WHOLE if length == (block or tile) else EVEN


def _taps(weight: Tensor) -> Tensor:
    """Depthwise weights [C, 1, k, k] as fp32 [k^2, C]: neighbouring threads, which hold neighbouring channels, read
    neighbouring numbers."""
    return weight.detach().flatten(1).t().to(torch.float32, memory_format=torch.contiguous_format).contiguous()

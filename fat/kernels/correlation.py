"""Triton: gradients of a depthwise convolution by weight and bias, a split reduction in two passes.

A program walks over tiles of its part of the batch and keeps one fp32 sum per tap, channel and column of the tile;
parts are added by a second reduction. No atomics: the same input gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fat.kernels import tiles


@triton.jit
def _correlate(
    gradient,
    x,
    out,
    bias_out,
    y,
    mean,
    by_mean,
    by_var,
    completed,
    batch,
    height,
    width,
    channels,
    grad_height,
    grad_width,
    row_tiles,
    col_tiles,
    channel_tiles,
    tiles_each,
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
    known = c < channels
    first_tap = group * COLUMNS

    sums = ()
    for _ in tl.static_range(COLUMNS * KERNEL):
        sums = sums + (tl.zeros((COLS, CHANNELS), tl.float32),)
    bias_sum = tl.zeros((COLS, CHANNELS), tl.float32)

    if y is not None:
        count = batch * grad_height * grad_width
        slope = tl.load(by_var + c, mask=known, other=0.0) * (2.0 / count)
        shift = tl.load(by_mean + c, mask=known, other=0.0) / count - slope * tl.load(mean + c, mask=known, other=0.0)

    start = part * tiles_each
    end = tl.minimum(start + tiles_each, batch * row_tiles * col_tiles)
    for tile in range(start, end):
        col = (tile % col_tiles) * COLS + tl.arange(0, COLS)
        top = (tile // col_tiles % row_tiles) * ROWS
        sample = (tile // col_tiles // row_tiles).to(tl.int64)
        gradients = gradient + sample * grad_height * grad_width * channels
        source = x + sample * height * width * channels
        uppers = ()
        for r in tl.static_range(ROWS):
            inside = (col < grad_width)[:, None] & known[None, :] & (top + r < grad_height)
            place = (top + r) * grad_width * channels + col[:, None] * channels + c[None, :]
            upper = tl.load(gradients + place, mask=inside, other=0.0).to(tl.float32)
            if y is not None:
                base = sample * grad_height * grad_width * channels
                value = tl.load(y + base + place, mask=inside, other=0.0).to(tl.float32)
                upper = tl.where(inside, upper + (value * slope[None, :] + shift[None, :]), 0.0)
                tl.store(completed + base + place, upper.to(completed.dtype.element_ty), mask=inside & (group == 0))
            bias_sum += upper
            uppers = uppers + (upper,)
        for j in tl.static_range(COLUMNS):
            source_col = col * STRIDE + (first_tap + j - pad)
            here = ((source_col >= 0) & (source_col < width))[:, None] & known[None, :]
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
            tl.store(out + c * KERNEL * KERNEL + tap, total, mask=known & (first_tap + j < KERNEL))
    tl.store(bias_out + part * channels + c, tl.sum(bias_sum, axis=0), mask=known & (group == 0))


@dataclass(frozen=True)
class Statistics:
    """Of the convolution's result y, whose mean and variance have gradients too: fp32 [C]."""

    y: Tensor
    mean: Tensor
    by_mean: Tensor
    by_var: Tensor
    completed: Tensor
    """Is filled with the whole gradient by y."""

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        """As `_correlate` takes them."""
        return self.y, self.mean, self.by_mean, self.by_var, self.completed


def weight_gradient(
    gradient: Tensor, x: Tensor, *, kernel: int, stride: int, statistics: Statistics | None = None
) -> tuple[Tensor, Tensor]:
    """fp32 [C, 1, k, k] and [C]."""
    batch, channels, height, width = x.shape
    grad_height, grad_width = gradient.shape[2:]
    tile, columns = tiles.weight_gradient(kernel, grad_height, grad_width, channels)
    row_tiles, col_tiles = triton.cdiv(grad_height, tile.rows), triton.cdiv(grad_width, tile.cols)
    channel_tiles = triton.cdiv(channels, tile.channels)
    programs_each = triton.cdiv(kernel, columns) * channel_tiles
    count = batch * row_tiles * col_tiles
    tiles_each = triton.cdiv(count, tiles.splits(count, programs_each))
    parts = triton.cdiv(count, tiles_each)
    out = x.new_empty(parts, channels, kernel * kernel, dtype=torch.float32)
    bias_out = x.new_empty(parts, channels, dtype=torch.float32)
    _correlate[(parts * programs_each,)](
        gradient,
        x,
        out,
        bias_out,
        *((None,) * 5 if statistics is None else statistics.arguments),
        batch,
        height,
        width,
        channels,
        grad_height,
        grad_width,
        row_tiles,
        col_tiles,
        channel_tiles,
        tiles_each,
        KERNEL=kernel,
        STRIDE=stride,
        COLUMNS=columns,
        ROWS=tile.rows,
        COLS=tile.cols,
        CHANNELS=tile.channels,
        num_warps=tile.warps,
    )
    return out.sum(0).view(channels, 1, kernel, kernel), bias_out.sum(0)

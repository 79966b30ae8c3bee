"""Triton kernels of BatchNorm and ReLU after a dense convolution, as in FAT's stem: statistics, result and gradients.

A feature map is a contiguous matrix with one row per position. A program processes some rows, and keeps BatchNorm's
values of each channel in registers. The number of channels is a constexpr argument: a model's stem has only two
different numbers, and without the constant Triton's compiler would not know that rows of 24 channels are aligned to 16
bytes.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fat.kernels.impl import batchnorm, tiles
from fat.kernels.impl import channel_sums as sums

WIDE = (128, 64, 32)  # choices for the number of channels per program
IN_FLIGHT, WARPS = 4096, 8  # elements of each feature map that a program loads at once, 16 per thread
PROGRAMS = 384  # target number of programs of a split reduction: nearly three per H100 multiprocessor
STEPS = 4  # tiles per program if there is no reduction


@triton.jit(do_not_specialize=("positions", "each"))
def _moments(x, stats, counts, positions, each, channels: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """x [positions, channels] -> stats fp32 [parts, 2, channels] (mean, sum of squared deviations) of `each` rows.

    The part's first row is subtracted before summing, so that a large mean does not cancel the deviations' digits.
    """
    part = tl.program_id(0)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mask = c < channels
    start = part.to(tl.int64) * each
    count = tl.minimum(positions - start, each).to(tl.int32)
    x += start * channels
    origin = tl.load(x + c, mask=mask, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    squares = tl.zeros((ROWS, CHANNELS), tl.float32)
    for first in range(0, count, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < count)[:, None] & mask[None, :]
        value = tl.load(x + row[:, None] * channels + c[None, :], mask=inside, other=0.0).to(tl.float32)
        value = tl.where(inside, value - origin[None, :], 0.0)
        total += value
        squares += value * value
    shift = tl.sum(total, axis=0)
    mean = shift / count
    slot = stats + part * 2 * channels + c
    tl.store(slot, origin + mean, mask=mask)
    tl.store(slot + channels, tl.sum(squares, axis=0) - shift * mean, mask=mask)
    tl.store(counts + part, count.to(tl.float32))


@triton.jit(do_not_specialize=("positions", "each"))
def _norm_relu(
    x,
    weight,
    bias,
    mean,
    var,
    out,
    positions,
    each,
    eps,
    channels: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mask = c < channels
    start = tl.program_id(0).to(tl.int64) * each
    count = tl.minimum(positions - start, each).to(tl.int32)
    x += start * channels
    out += start * channels
    scale = tl.rsqrt(tl.load(var + c, mask=mask, other=1.0) + eps)
    scale *= tl.load(weight + c, mask=mask, other=0.0).to(tl.float32)
    shift = tl.load(bias + c, mask=mask, other=0.0).to(tl.float32)
    mean_c = tl.load(mean + c, mask=mask, other=0.0)
    for first in range(0, count, ROWS):
        row = first + tl.arange(0, ROWS)
        at = row[:, None] * channels + c[None, :]
        inside = (row < count)[:, None] & mask[None, :]
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        value = (value - mean_c[None, :]) * scale[None, :] + shift[None, :]
        value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("positions", "each"))
def _norm_relu_sums(
    gradient,
    x,
    result,
    mean,
    var,
    out,
    positions,
    each,
    eps,
    channels: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """out fp32 [parts, 2, channels]: the sums of grad_out and of grad_out * normalized x, where grad_out is the
    gradient at positive results and 0 elsewhere."""
    part = tl.program_id(0)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mask = c < channels
    start = part.to(tl.int64) * each
    count = tl.minimum(positions - start, each).to(tl.int32)
    gradient += start * channels
    x += start * channels
    result += start * channels
    mean_c = tl.load(mean + c, mask=mask, other=0.0)
    gradients = tl.zeros((ROWS, CHANNELS), tl.float32)
    products = tl.zeros((ROWS, CHANNELS), tl.float32)
    for first in range(0, count, ROWS):
        row = first + tl.arange(0, ROWS)
        at = row[:, None] * channels + c[None, :]
        inside = (row < count)[:, None] & mask[None, :]
        grad_out = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        kept = tl.load(result + at, mask=inside, other=0.0).to(tl.float32)
        grad_out = tl.where(kept <= 0, 0.0, grad_out)
        gradients += grad_out
        products += grad_out * (value - mean_c[None, :])
    rstd = tl.rsqrt(tl.load(var + c, mask=mask, other=1.0) + eps)
    slot = out + part * 2 * channels + c
    tl.store(slot, tl.sum(gradients, axis=0), mask=mask)
    tl.store(slot + channels, tl.sum(products, axis=0) * rstd, mask=mask)


@triton.jit(do_not_specialize=("positions", "each"))
def _norm_relu_gradient(
    gradient,
    x,
    result,
    weight,
    mean,
    var,
    grad_bias,
    grad_weight,
    out,
    positions,
    each,
    inverse_count,
    eps,
    channels: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Gradient of x. inverse_count: 1 / number of values per channel over which the statistics were computed."""
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mask = c < channels
    start = tl.program_id(0).to(tl.int64) * each
    count = tl.minimum(positions - start, each).to(tl.int32)
    gradient += start * channels
    x += start * channels
    result += start * channels
    out += start * channels
    rstd = tl.rsqrt(tl.load(var + c, mask=mask, other=1.0) + eps)
    scale = rstd * tl.load(weight + c, mask=mask, other=0.0).to(tl.float32)
    shift = tl.load(grad_bias + c, mask=mask, other=0.0) * inverse_count
    slope = tl.load(grad_weight + c, mask=mask, other=0.0) * inverse_count * rstd
    mean_c = tl.load(mean + c, mask=mask, other=0.0)
    for first in range(0, count, ROWS):
        row = first + tl.arange(0, ROWS)
        at = row[:, None] * channels + c[None, :]
        inside = (row < count)[:, None] & mask[None, :]
        grad_out = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        kept = tl.load(result + at, mask=inside, other=0.0).to(tl.float32)
        grad_out = tl.where(kept <= 0, 0.0, grad_out)
        found = scale[None, :] * (grad_out - shift[None, :] - (value - mean_c[None, :]) * slope[None, :])
        tl.store(out + at, found.to(out.dtype.element_ty), mask=inside)


@cache
def launch_shape(positions: int, channels: int, *, split: bool) -> tuple[int, int, int]:
    """Return (channels per program, rows per iteration, rows per program). split: for a split reduction."""
    wide = tiles.widest(channels, WIDE)
    rows = min(IN_FLIGHT // wide, tiles.power_of_2(positions))
    steps = triton.cdiv(positions, rows)
    if not split:
        return wide, rows, rows * STEPS
    parts = min(steps, max(1, PROGRAMS // triton.cdiv(channels, wide)))
    return wide, rows, rows * triton.cdiv(steps, parts)


def channel_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each channel, fp32 [C]."""
    channels, positions = x.shape[1], x.numel() // x.shape[1]
    wide, rows, each = launch_shape(positions, channels, split=True)
    parts = triton.cdiv(positions, each)
    stats = x.new_empty(parts, 2, channels, dtype=torch.float32)
    counts = x.new_empty(parts, dtype=torch.float32)
    _moments[(parts, triton.cdiv(channels, wide))](
        x, stats, counts, positions, each, channels, ROWS=rows, CHANNELS=wide, num_warps=WARPS
    )
    return batchnorm.merge_stats(stats, counts)


def norm_relu(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float, out: Tensor) -> None:
    """Compute ReLU(BatchNorm(x)) into `out`."""
    channels, positions = x.shape[1], x.numel() // x.shape[1]
    wide, rows, each = launch_shape(positions, channels, split=False)
    _norm_relu[(triton.cdiv(positions, each), triton.cdiv(channels, wide))](
        x, weight, bias, mean, var, out, positions, each, eps, channels, ROWS=rows, CHANNELS=wide, num_warps=WARPS
    )


def norm_relu_sums(grad_out: Tensor, x: Tensor, result: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """Return the gradients of bias and weight, in this order, fp32 [2, C]."""
    channels, positions = x.shape[1], x.numel() // x.shape[1]
    wide, rows, each = launch_shape(positions, channels, split=True)
    parts = triton.cdiv(positions, each)
    partial = x.new_empty(parts, 2, channels, dtype=torch.float32)
    _norm_relu_sums[(parts, triton.cdiv(channels, wide))](
        grad_out,
        x,
        result,
        mean,
        var,
        partial,
        positions,
        each,
        eps,
        channels,
        ROWS=rows,
        CHANNELS=wide,
        num_warps=WARPS,
    )
    out = partial.new_empty(2, channels)
    sums.merge(partial, out)
    return out


def norm_relu_gradient(
    grad_out: Tensor,
    x: Tensor,
    result: Tensor,
    weight: Tensor,
    mean: Tensor,
    var: Tensor,
    grad_bias: Tensor,
    grad_weight: Tensor,
    count: int,
    eps: float,
    out: Tensor,
) -> None:
    """Compute the gradient of x into `out`."""
    channels, positions = x.shape[1], x.numel() // x.shape[1]
    wide, rows, each = launch_shape(positions, channels, split=False)
    _norm_relu_gradient[(triton.cdiv(positions, each), triton.cdiv(channels, wide))](
        grad_out,
        x,
        result,
        weight,
        mean,
        var,
        grad_bias,
        grad_weight,
        out,
        positions,
        each,
        1 / count,
        eps,
        channels,
        ROWS=rows,
        CHANNELS=wide,
        num_warps=WARPS,
    )

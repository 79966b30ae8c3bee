"""Triton: BatchNorm and ReLU behind a dense convolution, as in FAT's stem: statistics, result and gradients.

A map is a dense matrix of one row per position, and a program takes some rows, for which it keeps what the norm has per
channel. The number of channels is a constant of the kernels: a model's stem has two, and where it is 24 nothing else
would tell the compiler that rows begin at 16 bytes.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fat.kernels.impl import batchnorm, tiles
from fat.kernels.impl import channel_sums as sums

WIDE = (128, 64, 32)  # channels of a program
AT_ONCE, WARPS = 4096, 8  # elements of each map that a program has on their way, 16 a thread
PROGRAMS = 384  # of a split reduction: nearly three for each of an H100's multiprocessors
STEPS = 4  # tiles that a program of the others walks over


@triton.jit(do_not_specialize=("positions", "each"))
def _moments(x, moments, counts, positions, each, channels: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """x [positions, channels] -> moments fp32 [parts, 2, channels] (mean, sum of squared deviations) of `each` rows.

    Sums are of differences from the part's first row, so that no mean, however large, drowns the deviations.
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
    slot = moments + part * 2 * channels + c
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
    own_mean = tl.load(mean + c, mask=mask, other=0.0)
    for first in range(0, count, ROWS):
        row = first + tl.arange(0, ROWS)
        at = row[:, None] * channels + c[None, :]
        inside = (row < count)[:, None] & mask[None, :]
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        value = (value - own_mean[None, :]) * scale[None, :] + shift[None, :]
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
    """out fp32 [parts, 2, channels]: sums of the gradient where the result is positive, and of it times the normalised
    x."""
    part = tl.program_id(0)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mask = c < channels
    start = part.to(tl.int64) * each
    count = tl.minimum(positions - start, each).to(tl.int32)
    gradient += start * channels
    x += start * channels
    result += start * channels
    own_mean = tl.load(mean + c, mask=mask, other=0.0)
    plain = tl.zeros((ROWS, CHANNELS), tl.float32)
    products = tl.zeros((ROWS, CHANNELS), tl.float32)
    for first in range(0, count, ROWS):
        row = first + tl.arange(0, ROWS)
        at = row[:, None] * channels + c[None, :]
        inside = (row < count)[:, None] & mask[None, :]
        grad_out = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        kept = tl.load(result + at, mask=inside, other=0.0).to(tl.float32)
        grad_out = tl.where(kept <= 0, 0.0, grad_out)
        plain += grad_out
        products += grad_out * (value - own_mean[None, :])
    rstd = tl.rsqrt(tl.load(var + c, mask=mask, other=1.0) + eps)
    slot = out + part * 2 * channels + c
    tl.store(slot, tl.sum(plain, axis=0), mask=mask)
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
    share,
    eps,
    channels: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """share: one over how many values the statistics are of."""
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
    shift = tl.load(grad_bias + c, mask=mask, other=0.0) * share
    slope = tl.load(grad_weight + c, mask=mask, other=0.0) * share * rstd
    own_mean = tl.load(mean + c, mask=mask, other=0.0)
    for first in range(0, count, ROWS):
        row = first + tl.arange(0, ROWS)
        at = row[:, None] * channels + c[None, :]
        inside = (row < count)[:, None] & mask[None, :]
        grad_out = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        kept = tl.load(result + at, mask=inside, other=0.0).to(tl.float32)
        grad_out = tl.where(kept <= 0, 0.0, grad_out)
        found = scale[None, :] * (grad_out - shift[None, :] - (value - own_mean[None, :]) * slope[None, :])
        tl.store(out + at, found.to(out.dtype.element_ty), mask=inside)


@cache
def launch_shape(positions: int, channels: int, *, split: bool) -> tuple[int, int, int]:
    """(channels of a program, rows at once, rows of a program), where parts are to be joined or not."""
    wide = tiles.widest(channels, WIDE)
    rows = min(AT_ONCE // wide, tiles.power_of_2(positions))
    steps = triton.cdiv(positions, rows)
    if not split:
        return wide, rows, rows * STEPS
    parts = min(steps, max(1, PROGRAMS // triton.cdiv(channels, wide)))
    return wide, rows, rows * triton.cdiv(steps, parts)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance without correction over all but the channels, fp32 [C]."""
    channels, positions = x.shape[1], x.numel() // x.shape[1]
    wide, rows, each = launch_shape(positions, channels, split=True)
    parts = triton.cdiv(positions, each)
    found = x.new_empty(parts, 2, channels, dtype=torch.float32)
    counts = x.new_empty(parts, dtype=torch.float32)
    _moments[(parts, triton.cdiv(channels, wide))](
        x, found, counts, positions, each, channels, ROWS=rows, CHANNELS=wide, num_warps=WARPS
    )
    return batchnorm.join(found, counts)


def norm_relu(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float, out: Tensor) -> None:
    """Fills `out`."""
    channels, positions = x.shape[1], x.numel() // x.shape[1]
    wide, rows, each = launch_shape(positions, channels, split=False)
    _norm_relu[(triton.cdiv(positions, each), triton.cdiv(channels, wide))](
        x, weight, bias, mean, var, out, positions, each, eps, channels, ROWS=rows, CHANNELS=wide, num_warps=WARPS
    )


def norm_relu_sums(gradient: Tensor, x: Tensor, result: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """The gradients by bias and weight, fp32 [2, C]."""
    channels, positions = x.shape[1], x.numel() // x.shape[1]
    wide, rows, each = launch_shape(positions, channels, split=True)
    parts = triton.cdiv(positions, each)
    found = x.new_empty(parts, 2, channels, dtype=torch.float32)
    _norm_relu_sums[(parts, triton.cdiv(channels, wide))](
        gradient,
        x,
        result,
        mean,
        var,
        found,
        positions,
        each,
        eps,
        channels,
        ROWS=rows,
        CHANNELS=wide,
        num_warps=WARPS,
    )
    out = found.new_empty(2, channels)
    sums.join(found, out)
    return out


def norm_relu_gradient(
    gradient: Tensor,
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
    """Fills `out`."""
    channels, positions = x.shape[1], x.numel() // x.shape[1]
    wide, rows, each = launch_shape(positions, channels, split=False)
    _norm_relu_gradient[(triton.cdiv(positions, each), triton.cdiv(channels, wide))](
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
        1 / count,
        eps,
        channels,
        ROWS=rows,
        CHANNELS=wide,
        num_warps=WARPS,
    )

"""Triton kernels of GroupNorm with one group over channels-last feature maps, with a residual add before it.

A sample is a contiguous row of H W C numbers. Its statistics are computed in two steps: each part of the row yields its
count, mean and sum of squared deviations (in fp32, in two passes over registers), and the kernel that normalizes merges
the parts. This avoids cancellation if deviations are small compared with the mean. The statistics are those of the
stored, rounded values, which the backward pass reads too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fat.kernels.impl import tiles


@triton.jit
def _add(x, branch, scale, out, stats, numel, BLOCK: tl.constexpr):
    """With a branch: out = x + scale[sample] * branch, computed in fp32; x and scale are optional. With stats: store
    the statistics of each part of out, or of x if there is no branch."""
    part, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = part * BLOCK + tl.arange(0, BLOCK)
    mask = at < numel
    if branch is None:
        stored = tl.load(x + sample * numel + at, mask=mask, other=0.0)
    else:
        total = tl.load(branch + sample * numel + at, mask=mask, other=0.0).to(tl.float32)
        if scale is not None:
            total *= tl.load(scale + sample)
        if x is not None:
            total += tl.load(x + sample * numel + at, mask=mask, other=0.0).to(tl.float32)
        stored = total.to(out.dtype.element_ty)
        tl.store(out + sample * numel + at, stored, mask=mask)
    if stats is not None:
        value = tl.where(mask, stored.to(tl.float32), 0.0)
        count = tl.minimum(numel - part * BLOCK, BLOCK)
        mean = tl.sum(value, axis=0) / count
        deviation = tl.where(mask, value - mean, 0.0)
        slot = stats + (sample * tl.num_programs(0) + part) * 3
        tl.store(slot, count.to(tl.float32))
        tl.store(slot + 1, mean)
        tl.store(slot + 2, tl.sum(deviation * deviation, axis=0))


@triton.jit(do_not_specialize=("parts",))
def _normalize(
    x,
    stats,
    weight,
    bias,
    out,
    mean_out,
    rstd_out,
    numel,
    channels,
    parts,
    eps,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    part, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = part * BLOCK + tl.arange(0, BLOCK)
    mask = at < numel
    value = tl.load(x + sample * numel + at, mask=mask, other=0.0).to(tl.float32)  # overlaps with the merge below

    slots = stats + sample * parts * 3
    total = tl.zeros((PARTS,), tl.float32)
    for first in range(0, parts, PARTS):
        slot = first + tl.arange(0, PARTS)
        count = tl.load(slots + slot * 3, mask=slot < parts, other=0.0)
        total += count * tl.load(slots + slot * 3 + 1, mask=slot < parts, other=0.0)
    mean = tl.sum(total, axis=0) / numel
    squares = tl.zeros((PARTS,), tl.float32)
    for first in range(0, parts, PARTS):
        slot = first + tl.arange(0, PARTS)
        count = tl.load(slots + slot * 3, mask=slot < parts, other=0.0)
        shift = tl.load(slots + slot * 3 + 1, mask=slot < parts, other=0.0) - mean
        squares += tl.load(slots + slot * 3 + 2, mask=slot < parts, other=0.0) + count * shift * shift
    rstd = tl.rsqrt(tl.sum(squares, axis=0) / numel + eps)
    if part == 0:
        tl.store(mean_out + sample, mean)
        tl.store(rstd_out + sample, rstd)

    c = at % channels
    gain = tl.load(weight + c, mask=mask, other=0.0).to(tl.float32)
    shift = tl.load(bias + c, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + sample * numel + at, ((value - mean) * rstd * gain + shift).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=("positions", "each"))
def _sums(
    gradient,
    x,
    mean,
    rstd,
    weight,
    channel_sums,
    sample_sums,
    positions,
    channels,
    each,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Compute for each part of a sample the sums of gradient * normalized x and of gradient over its positions, per
    channel (channel_sums), and over all channels with the gradient multiplied by weight (sample_sums)."""
    part, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    c = tl.arange(0, CHANNELS)
    mask = c < channels
    base = sample * positions * channels
    sample_mean, sample_rstd = tl.load(mean + sample), tl.load(rstd + sample)
    products = tl.zeros((ROWS, CHANNELS), tl.float32)
    gradients = tl.zeros((ROWS, CHANNELS), tl.float32)
    end = tl.minimum(part * each + each, positions)
    for first in range(part * each, end, ROWS):
        p = first + tl.arange(0, ROWS)
        inside = (p < end)[:, None] & mask[None, :]
        at = base + p[:, None] * channels + c[None, :]
        grad_out = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        products += grad_out * ((value - sample_mean) * sample_rstd)
        gradients += grad_out
    grad_weight, grad_bias = tl.sum(products, axis=0), tl.sum(gradients, axis=0)
    slot = sample * tl.num_programs(0) + part
    tl.store(channel_sums + slot * 2 * channels + c, grad_weight, mask=mask)
    tl.store(channel_sums + slot * 2 * channels + channels + c, grad_bias, mask=mask)
    gain = tl.load(weight + c, mask=mask, other=0.0).to(tl.float32)
    tl.store(sample_sums + slot * 2, tl.sum(gain * grad_weight, axis=0))
    tl.store(sample_sums + slot * 2 + 1, tl.sum(gain * grad_bias, axis=0))


@triton.jit(do_not_specialize=("parts",))
def _input_gradient(
    gradient,
    x,
    mean,
    rstd,
    weight,
    sample_sums,
    residual,
    scale,
    out,
    branch_out,
    numel,
    channels,
    parts,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = residual + rstd (g - mean(g) - xhat mean(g xhat)) with g = gradient * weight; branch_out = scale * out."""
    part, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = part * BLOCK + tl.arange(0, BLOCK)
    mask = at < numel
    at_sample = sample * numel + at
    grad_out = tl.load(gradient + at_sample, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(x + at_sample, mask=mask, other=0.0).to(tl.float32)

    products = tl.zeros((PARTS,), tl.float32)
    gradients = tl.zeros((PARTS,), tl.float32)
    for first in range(0, parts, PARTS):
        slot = first + tl.arange(0, PARTS)
        products += tl.load(sample_sums + (sample * parts + slot) * 2, mask=slot < parts, other=0.0)
        gradients += tl.load(sample_sums + (sample * parts + slot) * 2 + 1, mask=slot < parts, other=0.0)
    mean_product, mean_gradient = tl.sum(products, axis=0) / numel, tl.sum(gradients, axis=0) / numel

    sample_rstd = tl.load(rstd + sample)
    gain = tl.load(weight + at % channels, mask=mask, other=0.0).to(tl.float32)
    normal = (value - tl.load(mean + sample)) * sample_rstd
    result = sample_rstd * (grad_out * gain - mean_gradient - normal * mean_product)
    if residual is not None:
        result += tl.load(residual + at_sample, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at_sample, result.to(out.dtype.element_ty), mask=mask)
    if branch_out is not None:
        if scale is not None:
            result *= tl.load(scale + sample)
        tl.store(branch_out + at_sample, result.to(branch_out.dtype.element_ty), mask=mask)


def add(
    x: Tensor | None, branch: Tensor | None, scale: Tensor | None, out: Tensor, *, with_stats: bool
) -> Tensor | None:
    """Compute x + scale * branch into `out`, if there is a branch.

    with_stats: return partial statistics of out, or of x if there is no branch, fp32 [B, parts, 3]: count, mean, sum of
    squared deviations.
    """
    batch, numel = out.shape[0], out[0].numel()
    parts = triton.cdiv(numel, tiles.FLAT)
    stats = out.new_empty(batch, parts, 3, dtype=torch.float32) if with_stats else None
    _add[(parts, batch)](x, branch, scale, out, stats, numel, BLOCK=tiles.FLAT, num_warps=tiles.FLAT_WARPS)
    return stats


def normalize(
    x: Tensor, stats: Tensor, weight: Tensor, bias: Tensor, out: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Normalize x into `out`, and return each sample's mean and reciprocal standard deviation, fp32 [B].

    stats: partial statistics of x, as returned by `add`.
    """
    batch, channels, numel = x.shape[0], x.shape[1], x[0].numel()
    parts = stats.shape[1]
    mean, rstd = (x.new_empty(batch, dtype=torch.float32) for _ in range(2))
    _normalize[(triton.cdiv(numel, tiles.FLAT), batch)](
        x,
        stats,
        weight,
        bias,
        out,
        mean,
        rstd,
        numel,
        channels,
        parts,
        eps,
        PARTS=tiles.merge_block(parts),
        BLOCK=tiles.FLAT,
        num_warps=tiles.FLAT_WARPS,
    )
    return mean, rstd


def gradients(
    grad_out: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    out: Tensor,
    branch_out: Tensor | None,
) -> Tensor:
    """Compute the gradient of x, plus residual, into `out`, and scale times `out` into `branch_out` if it is given.

    Returns the gradients of weight and bias, fp32 [2, C].
    """
    batch, channels, height, width = x.shape
    positions, numel = height * width, x[0].numel()
    rows, each = tiles.column_sums(positions, channels)
    parts = triton.cdiv(positions, each)
    channel_sums = x.new_empty(batch * parts, 2, channels, dtype=torch.float32)
    sample_sums = x.new_empty(batch, parts, 2, dtype=torch.float32)
    _sums[(parts, batch)](
        grad_out,
        x,
        mean,
        rstd,
        weight,
        channel_sums,
        sample_sums,
        positions,
        channels,
        each,
        ROWS=rows,
        CHANNELS=tiles.power_of_2(channels),
        num_warps=tiles.FLAT_WARPS,
    )
    _input_gradient[(triton.cdiv(numel, tiles.FLAT), batch)](
        grad_out,
        x,
        mean,
        rstd,
        weight,
        sample_sums,
        residual,
        scale,
        out,
        branch_out,
        numel,
        channels,
        parts,
        PARTS=tiles.merge_block(parts),
        BLOCK=tiles.FLAT,
        num_warps=tiles.FLAT_WARPS,
    )
    return channel_sums.sum(0)

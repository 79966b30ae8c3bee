"""Triton kernels of BatchNorm between a depthwise and a 1x1 convolution (`fat.batchnorm`).

They compute only statistics and weights. Feature maps are processed by the convolutions' kernels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fat.kernels.impl import tiles


@triton.jit(do_not_specialize=("parts", "each"))
def _join(
    stats,
    counts,
    mean_out,
    squares_out,
    counts_out,
    parts,
    channels,
    each,
    LAST: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Merge partial statistics: stats fp32 [parts, 2, channels] (mean, sum of squared deviations) of counts [parts]
    values -> statistics of groups of `each` parts, with a stride of 2 * channels. LAST: there is one group, and the
    variance is stored instead of the sum of squared deviations."""
    group = tl.program_id(0)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mask = c < channels
    end = tl.minimum(group * each + each, parts)
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    number = tl.zeros((ROWS,), tl.float32)
    for first in range(group * each, end, ROWS):
        part = first + tl.arange(0, ROWS)
        inside = (part < end)[:, None] & mask[None, :]
        count = tl.load(counts + part, mask=part < end, other=0.0)
        total += count[:, None] * tl.load(stats + part[:, None] * 2 * channels + c[None, :], mask=inside, other=0.0)
        number += count
    count_all = tl.sum(number, axis=0)
    mean = tl.sum(total, axis=0) / count_all
    squares = tl.zeros((ROWS, CHANNELS), tl.float32)
    for first in range(group * each, end, ROWS):
        part = first + tl.arange(0, ROWS)
        inside = (part < end)[:, None] & mask[None, :]
        count = tl.load(counts + part, mask=part < end, other=0.0)
        at = part[:, None] * 2 * channels + c[None, :]
        shift = tl.where(inside, tl.load(stats + at, mask=inside, other=0.0) - mean[None, :], 0.0)
        squares += tl.load(stats + at + channels, mask=inside, other=0.0) + count[:, None] * shift * shift
    result = tl.sum(squares, axis=0)
    if LAST:
        result /= count_all
    tl.store(mean_out + group * 2 * channels + c, mean, mask=mask)
    tl.store(squares_out + group * 2 * channels + c, result, mask=mask)
    tl.store(counts_out + group, count_all)


@triton.jit
def _update_running_stats(
    running_mean, running_var, batches, drift, var, channels, momentum, correction, CHANNELS: tl.constexpr
):
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    mask = c < channels
    old = tl.load(running_mean + c, mask=mask)
    tl.store(running_mean + c, old + momentum * tl.load(drift + c, mask=mask), mask=mask)
    old, new = tl.load(running_var + c, mask=mask), tl.load(var + c, mask=mask) * correction
    tl.store(running_var + c, old + momentum * (new - old), mask=mask)
    if tl.program_id(0) == 0:
        tl.store(batches, tl.load(batches) + 1)


@triton.jit
def _fold(
    weight,
    bias,
    gain,
    shift,
    mean,
    var,
    folded,
    folded_bias,
    channels,
    eps,
    CHANNELS: tl.constexpr,
):
    """Fold BatchNorm into a row of a 1x1 convolution's weights [outputs, channels] and its bias."""
    row = tl.program_id(0)
    c = tl.arange(0, CHANNELS)
    mask = c < channels
    row_weight = tl.load(weight + row * channels + c, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(gain + c, mask=mask, other=0.0).to(tl.float32)
    scale *= tl.rsqrt(tl.load(var + c, mask=mask, other=1.0) + eps)
    rounded = (row_weight * scale).to(folded.dtype.element_ty)
    tl.store(folded + row * channels + c, rounded, mask=mask)
    added = row_weight * tl.load(shift + c, mask=mask, other=0.0).to(tl.float32)
    added -= rounded.to(tl.float32) * tl.load(mean + c, mask=mask, other=0.0)
    total = tl.load(bias + row).to(tl.float32) + tl.sum(added, axis=0)
    tl.store(folded_bias + row, total.to(folded_bias.dtype.element_ty))


@triton.jit(do_not_specialize=("outputs",))
def _fold_gradient(
    grad_folded,
    grad_folded_bias,
    weight,
    gain,
    shift,
    mean,
    var,
    folded,
    grad_weight,
    grad_gain,
    grad_shift,
    grad_mean,
    grad_var,
    outputs,
    channels,
    eps,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Gradients of weight [outputs, channels], and of gain, shift, mean and var [channels]. A program computes CHANNELS
    channels."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    mask = c < channels
    mean_c = tl.load(mean + c, mask=mask, other=0.0)
    rstd = tl.rsqrt(tl.load(var + c, mask=mask, other=1.0) + eps)
    gain_c = tl.load(gain + c, mask=mask, other=0.0).to(tl.float32)
    shift_c = tl.load(shift + c, mask=mask, other=0.0).to(tl.float32)
    scale_sum = tl.zeros((ROWS, CHANNELS), tl.float32)
    shift_sum = tl.zeros((ROWS, CHANNELS), tl.float32)
    mean_sum = tl.zeros((ROWS, CHANNELS), tl.float32)
    for first in range(0, outputs, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < outputs)[:, None] & mask[None, :]
        at = row[:, None] * channels + c[None, :]
        rows = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
        grad_out = tl.load(grad_folded + at, mask=inside, other=0.0).to(tl.float32)
        grad_bias = tl.load(grad_folded_bias + row, mask=row < outputs, other=0.0).to(tl.float32)[:, None]
        mean_sum -= grad_bias * tl.load(folded + at, mask=inside, other=0.0).to(tl.float32)
        grad_out -= grad_bias * mean_c[None, :]
        scale_sum += grad_out * rows
        shift_sum += grad_bias * rows
        result = grad_out * (gain_c * rstd)[None, :] + grad_bias * shift_c[None, :]
        tl.store(grad_weight + at, result.to(grad_weight.dtype.element_ty), mask=inside)
    grad_scale = tl.sum(scale_sum, axis=0)
    tl.store(grad_gain + c, (grad_scale * rstd).to(grad_gain.dtype.element_ty), mask=mask)
    tl.store(grad_shift + c, tl.sum(shift_sum, axis=0).to(grad_shift.dtype.element_ty), mask=mask)
    tl.store(grad_mean + c, tl.sum(mean_sum, axis=0), mask=mask)
    tl.store(grad_var + c, grad_scale * gain_c * rstd * rstd * rstd * -0.5, mask=mask)


def merge_stats(stats: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Merge partial statistics to mean and biased variance, fp32 [C].

    stats: fp32 [parts, 2, C], mean and sum of squared deviations of each part. counts: fp32 [parts], values per part.
    """
    while True:
        parts, _, channels = stats.shape
        each = min(parts, tiles.MERGED_EACH)
        groups = triton.cdiv(parts, each)
        counts_out = counts.new_empty(groups)
        if groups > 1:
            out = stats.new_empty(groups, 2, channels)
            mean, squares = out[0].unbind()
        else:
            mean, squares = (stats.new_empty(channels) for _ in range(2))
        _join[(groups, triton.cdiv(channels, tiles.MERGED_CHANNELS))](
            stats,
            counts,
            mean,
            squares,
            counts_out,
            parts,
            channels,
            each,
            LAST=groups == 1,
            ROWS=tiles.MERGED_ROWS,
            CHANNELS=tiles.MERGED_CHANNELS,
            num_warps=tiles.MERGED_WARPS,
        )
        if groups == 1:
            return mean, squares
        stats, counts = out, counts_out


def update_running_stats(
    running_mean: Tensor,
    running_var: Tensor,
    batches: Tensor,
    drift: Tensor,
    var: Tensor,
    momentum: float,
    correction: float,
) -> None:
    """Update the running statistics and the batch counter in place."""
    channels = drift.numel()
    _update_running_stats[(triton.cdiv(channels, tiles.RUNNING_STATS_CHANNELS),)](
        running_mean,
        running_var,
        batches,
        drift,
        var,
        channels,
        momentum,
        correction,
        CHANNELS=tiles.RUNNING_STATS_CHANNELS,
        num_warps=tiles.RUNNING_STATS_WARPS,
    )


def fold(
    weight: Tensor,
    bias: Tensor,
    gain: Tensor,
    shift: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    folded: Tensor,
    folded_bias: Tensor,
) -> None:
    """Compute the folded weights into `folded` [O, C, 1, 1] and `folded_bias` [O]."""
    outputs, channels = weight.shape[:2]
    wide = tiles.power_of_2(channels)
    _fold[(outputs,)](
        weight,
        bias,
        gain,
        shift,
        mean,
        var,
        folded,
        folded_bias,
        channels,
        eps,
        CHANNELS=wide,
        num_warps=tiles.warps(wide // 4),
    )


def fold_gradient(
    grad_folded: Tensor,
    grad_folded_bias: Tensor,
    weight: Tensor,
    gain: Tensor,
    shift: Tensor,
    mean: Tensor,
    var: Tensor,
    folded: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of weight, gain and shift, in their dtypes, and of mean and variance, in fp32."""
    outputs, channels = weight.shape[:2]
    results = tuple(torch.empty_like(tensor) for tensor in (weight, gain, shift, mean, var))
    _fold_gradient[(triton.cdiv(channels, tiles.FOLDED_CHANNELS),)](
        grad_folded,
        grad_folded_bias,
        weight,
        gain,
        shift,
        mean,
        var,
        folded,
        *results,
        outputs,
        channels,
        eps,
        ROWS=min(tiles.FOLDED_ROWS, tiles.power_of_2(outputs)),
        CHANNELS=tiles.FOLDED_CHANNELS,
        num_warps=tiles.FOLDED_WARPS,
    )
    return results  # type: ignore[return-value]

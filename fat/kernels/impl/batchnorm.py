"""Triton: what is left of BatchNorm between a depthwise and a 1x1 convolution. See `fat.batchnorm`.

All of it works on statistics and weights; the maps' share is done by the convolutions' own kernels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fat.kernels.impl import tiles


@triton.jit(do_not_specialize=("parts", "each"))
def _join(
    moments,
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
    """moments fp32 [parts, 2, channels] (mean, sum of squared deviations) over counts [parts] values -> the same of
    groups of `each` parts, 2 channels apart. The LAST, which has but one group, writes the variance for the sum."""
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
        total += count[:, None] * tl.load(moments + part[:, None] * 2 * channels + c[None, :], mask=inside, other=0.0)
        number += count
    count_all = tl.sum(number, axis=0)
    mean = tl.sum(total, axis=0) / count_all
    squares = tl.zeros((ROWS, CHANNELS), tl.float32)
    for first in range(group * each, end, ROWS):
        part = first + tl.arange(0, ROWS)
        inside = (part < end)[:, None] & mask[None, :]
        count = tl.load(counts + part, mask=part < end, other=0.0)
        at = part[:, None] * 2 * channels + c[None, :]
        shift = tl.where(inside, tl.load(moments + at, mask=inside, other=0.0) - mean[None, :], 0.0)
        squares += tl.load(moments + at + channels, mask=inside, other=0.0) + count[:, None] * shift * shift
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
    """A row of a 1x1 convolution's weights [outputs, channels] and its bias, with the norm's work in them."""
    row = tl.program_id(0)
    c = tl.arange(0, CHANNELS)
    mask = c < channels
    own = tl.load(weight + row * channels + c, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(gain + c, mask=mask, other=0.0).to(tl.float32)
    scale *= tl.rsqrt(tl.load(var + c, mask=mask, other=1.0) + eps)
    rounded = (own * scale).to(folded.dtype.element_ty)
    tl.store(folded + row * channels + c, rounded, mask=mask)
    added = own * tl.load(shift + c, mask=mask, other=0.0).to(tl.float32)
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
    """The gradients by weight [outputs, channels] and by what each channel has; a program takes some channels."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    mask = c < channels
    own_mean = tl.load(mean + c, mask=mask, other=0.0)
    rstd = tl.rsqrt(tl.load(var + c, mask=mask, other=1.0) + eps)
    own_gain = tl.load(gain + c, mask=mask, other=0.0).to(tl.float32)
    own_shift = tl.load(shift + c, mask=mask, other=0.0).to(tl.float32)
    scale_sum = tl.zeros((ROWS, CHANNELS), tl.float32)
    shift_sum = tl.zeros((ROWS, CHANNELS), tl.float32)
    mean_sum = tl.zeros((ROWS, CHANNELS), tl.float32)
    for first in range(0, outputs, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < outputs)[:, None] & mask[None, :]
        at = row[:, None] * channels + c[None, :]
        own = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
        grad_out = tl.load(grad_folded + at, mask=inside, other=0.0).to(tl.float32)
        upper_bias = tl.load(grad_folded_bias + row, mask=row < outputs, other=0.0).to(tl.float32)[:, None]
        mean_sum -= upper_bias * tl.load(folded + at, mask=inside, other=0.0).to(tl.float32)
        grad_out -= upper_bias * own_mean[None, :]
        scale_sum += grad_out * own
        shift_sum += upper_bias * own
        result = grad_out * (own_gain * rstd)[None, :] + upper_bias * own_shift[None, :]
        tl.store(grad_weight + at, result.to(grad_weight.dtype.element_ty), mask=inside)
    grad_scale = tl.sum(scale_sum, axis=0)
    tl.store(grad_gain + c, (grad_scale * rstd).to(grad_gain.dtype.element_ty), mask=mask)
    tl.store(grad_shift + c, tl.sum(shift_sum, axis=0).to(grad_shift.dtype.element_ty), mask=mask)
    tl.store(grad_mean + c, tl.sum(mean_sum, axis=0), mask=mask)
    tl.store(grad_var + c, grad_scale * own_gain * rstd * rstd * rstd * -0.5, mask=mask)


def join(moments: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """moments fp32 [parts, 2, C], counts fp32 [parts] -> mean and variance without correction, fp32 [C]."""
    while True:
        parts, _, channels = moments.shape
        each = min(parts, tiles.JOINED_EACH)
        groups = triton.cdiv(parts, each)
        counts_out = counts.new_empty(groups)
        if groups > 1:
            out = moments.new_empty(groups, 2, channels)
            mean, squares = out[0].unbind()
        else:
            mean, squares = (moments.new_empty(channels) for _ in range(2))
        _join[(groups, triton.cdiv(channels, tiles.JOINED_CHANNELS))](
            moments,
            counts,
            mean,
            squares,
            counts_out,
            parts,
            channels,
            each,
            LAST=groups == 1,
            ROWS=tiles.JOINED_ROWS,
            CHANNELS=tiles.JOINED_CHANNELS,
            num_warps=tiles.JOINED_WARPS,
        )
        if groups == 1:
            return mean, squares
        moments, counts = out, counts_out


def update_running_stats(
    running_mean: Tensor,
    running_var: Tensor,
    batches: Tensor,
    drift: Tensor,
    var: Tensor,
    momentum: float,
    correction: float,
) -> None:
    """Moves the running statistics and counts a batch, in place."""
    channels = drift.numel()
    _update_running_stats[(triton.cdiv(channels, tiles.FOLLOWED),)](
        running_mean,
        running_var,
        batches,
        drift,
        var,
        channels,
        momentum,
        correction,
        CHANNELS=tiles.FOLLOWED,
        num_warps=tiles.FOLLOWED_WARPS,
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
    """Fills `folded` [O, C, 1, 1] and `folded_bias` [O]."""
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
    """By weight, gain and shift in their dtypes, by mean and variance in fp32."""
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

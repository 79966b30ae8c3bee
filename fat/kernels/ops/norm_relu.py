"""Operators `fat::channel_stats` and `fat::norm_relu*`: BatchNorm in training and ReLU behind a dense convolution, as
in FAT's stem. See `fat.kernels.ops`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from fat.batchnorm import BatchNorm
from fat.kernels.families import BATCH_NORM, BIAS_GRADIENT, launches
from fat.kernels.ops.checks import channels_last, expect


@custom_op("fat::channel_stats", mutates_args=())
@launches(BATCH_NORM)
def channel_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (without correction) over all but the channels: fp32 [C]. Deterministic."""
    from fat.kernels.impl import norm_relu as kernels

    expect(x)
    return kernels.moments(x)


@channel_stats.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[1], dtype=torch.float32), x.new_empty(x.shape[1], dtype=torch.float32)


@custom_op("fat::norm_relu", mutates_args=())
@launches(BATCH_NORM)
def norm_relu(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """ReLU(BatchNorm(x)) with these statistics, fp32 [C]."""
    from fat.kernels.impl import norm_relu as kernels

    expect(x)
    out = torch.empty_like(x)
    kernels.norm_relu(x, weight, bias, mean, var, eps, out)
    return out


@norm_relu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


@custom_op("fat::norm_relu_sums", mutates_args=())
@launches(BIAS_GRADIENT, BATCH_NORM)
def norm_relu_sums(gradient: Tensor, x: Tensor, result: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """The gradients by the norm's bias and weight, fp32 [2, C]. Deterministic."""
    from fat.kernels.impl import norm_relu as kernels

    expect(gradient, x, result)
    return kernels.norm_relu_sums(gradient, x, result, mean, var, eps)


@norm_relu_sums.register_fake
def _(gradient: Tensor, x: Tensor, result: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    return mean.new_empty(2, x.shape[1])


@custom_op("fat::norm_relu_gradient", mutates_args=())
@launches(BATCH_NORM)
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
) -> Tensor:
    """The gradient by x, through the statistics too, which are of `count` values per channel.

    grad_bias, grad_weight: `norm_relu_sums`, over all of these values.
    """
    from fat.kernels.impl import norm_relu as kernels

    expect(gradient, x, result)
    out = torch.empty_like(x)
    kernels.norm_relu_gradient(gradient, x, result, weight, mean, var, grad_bias, grad_weight, count, eps, out)
    return out


@norm_relu_gradient.register_fake
def _(gradient: Tensor, x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def batch_norm_relu(x: Tensor, before: Tensor | None, norm: BatchNorm) -> tuple[Tensor, Tensor, Tensor]:
    """(ReLU(norm(x)), mean, variance without correction), differentiable the first, in training.

    before: the bias that the convolution has left out, for the norm takes it out again: its gradient is zero.
    """
    result: tuple[Tensor, Tensor, Tensor] = _BatchNormReLU.apply(x, before, norm.weight, norm.bias, norm)
    return result


class _BatchNormReLU(torch.autograd.Function):
    """Not an operator: what ranks share lies between its parts."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, before: Tensor | None, weight: Tensor, bias: Tensor, norm: BatchNorm
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, var = norm.sync_stats(*channel_stats(x))
        result = norm_relu(x, weight, bias, mean, var, norm.eps)
        ctx.save_for_backward(x, result, weight, mean, var)
        ctx.norm, ctx.before, ctx.bias_dtype = norm, None if before is None else before.dtype, bias.dtype
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)  # mean's and var's would be launches for nothing
        return result, mean, var

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, result, weight, mean, var = ctx.saved_tensors
        gradient, norm = channels_last(gradient), ctx.norm
        sums = norm_relu_sums(gradient, x, result, mean, var, norm.eps)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_bias, grad_weight = norm.sync_sum(sums).unbind()
            count = norm.ranks * (x.numel() // x.shape[1])
            grad_x = norm_relu_gradient(gradient, x, result, weight, mean, var, grad_bias, grad_weight, count, norm.eps)
        grad_before = None if ctx.before is None else torch.zeros_like(mean, dtype=ctx.before)
        # Those of this rank's rows: weights' gradients are averaged with all others afterwards.
        return grad_x, grad_before, sums[1].to(weight.dtype), sums[0].to(ctx.bias_dtype), None

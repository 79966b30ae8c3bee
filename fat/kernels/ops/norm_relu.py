"""Operators `fat::channel_stats` and `fat::norm_relu*`: BatchNorm in training and ReLU after a dense convolution, as in
FAT's stem. See `fat.kernels.ops`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from fat.batchnorm import BatchNorm
from fat.kernels.families import BATCH_NORM, BIAS_GRADIENT, launches
from fat.kernels.ops.checks import channels_last, check_feature_maps


@custom_op("fat::channel_stats", mutates_args=())
@launches(BATCH_NORM)
def channel_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each channel: fp32 [C]. Deterministic."""
    from fat.kernels.impl import norm_relu as kernels

    check_feature_maps(x)
    return kernels.channel_stats(x)


@channel_stats.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[1], dtype=torch.float32), x.new_empty(x.shape[1], dtype=torch.float32)


@custom_op("fat::norm_relu", mutates_args=())
@launches(BATCH_NORM)
def norm_relu(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """Compute ReLU(BatchNorm(x)) with the given statistics, fp32 [C]."""
    from fat.kernels.impl import norm_relu as kernels

    check_feature_maps(x)
    out = torch.empty_like(x)
    kernels.norm_relu(x, weight, bias, mean, var, eps, out)
    return out


@norm_relu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


@custom_op("fat::norm_relu_sums", mutates_args=())
@launches(BIAS_GRADIENT, BATCH_NORM)
def norm_relu_sums(grad_out: Tensor, x: Tensor, result: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """Return the gradients of BatchNorm's bias and weight, in this order, fp32 [2, C]. Deterministic."""
    from fat.kernels.impl import norm_relu as kernels

    check_feature_maps(grad_out, x, result)
    return kernels.norm_relu_sums(grad_out, x, result, mean, var, eps)


@norm_relu_sums.register_fake
def _(grad_out: Tensor, x: Tensor, result: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    return mean.new_empty(2, x.shape[1])


@custom_op("fat::norm_relu_gradient", mutates_args=())
@launches(BATCH_NORM)
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
) -> Tensor:
    """Return the gradient of x, including that through the statistics.

    grad_bias, grad_weight: `norm_relu_sums`, summed over all ranks that share the statistics.
    count: number of values per channel over which the statistics were computed.
    """
    from fat.kernels.impl import norm_relu as kernels

    check_feature_maps(grad_out, x, result)
    out = torch.empty_like(x)
    kernels.norm_relu_gradient(grad_out, x, result, weight, mean, var, grad_bias, grad_weight, count, eps, out)
    return out


@norm_relu_gradient.register_fake
def _(grad_out: Tensor, x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def batch_norm_relu(x: Tensor, conv_bias: Tensor | None, norm: BatchNorm) -> tuple[Tensor, Tensor, Tensor]:
    """Return ReLU(norm(x)) with batch statistics, and mean and biased variance. Only the first is differentiable.

    conv_bias: bias of the convolution that computed x, which did not add it. BatchNorm would subtract it again, so it
    does not change the result, and its gradient is zero.
    """
    result: tuple[Tensor, Tensor, Tensor] = _BatchNormReLU.apply(x, conv_bias, norm.weight, norm.bias, norm)
    return result


class _BatchNormReLU(torch.autograd.Function):
    """An autograd function, not one operator, because ranks exchange statistics between its parts."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, conv_bias: Tensor | None, weight: Tensor, bias: Tensor, norm: BatchNorm
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, var = norm.sync_stats(*channel_stats(x))
        result = norm_relu(x, weight, bias, mean, var, norm.eps)
        ctx.save_for_backward(x, result, weight, mean, var)
        ctx.norm, ctx.bias_dtype = norm, bias.dtype
        ctx.conv_bias_dtype = None if conv_bias is None else conv_bias.dtype
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)  # avoids kernels that would write zeros as the gradients of mean and var
        return result, mean, var

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, result, weight, mean, var = ctx.saved_tensors
        grad_out, norm = channels_last(grad_out), ctx.norm
        sums = norm_relu_sums(grad_out, x, result, mean, var, norm.eps)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_bias, grad_weight = norm.sync_sum(sums).unbind()
            count = norm.ranks * (x.numel() // x.shape[1])
            grad_x = norm_relu_gradient(grad_out, x, result, weight, mean, var, grad_bias, grad_weight, count, norm.eps)
        grad_conv_bias = None if ctx.conv_bias_dtype is None else torch.zeros_like(mean, dtype=ctx.conv_bias_dtype)
        # Return the sums of this rank only: weight gradients are averaged over the ranks after the backward pass.
        return grad_x, grad_conv_bias, sums[1].to(weight.dtype), sums[0].to(ctx.bias_dtype), None

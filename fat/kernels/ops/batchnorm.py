"""Operators `fat::depthwise_stats` and `fat::fold`: BatchNorm between a depthwise and a 1x1 convolution, without a
separate pass over memory. See `fat.batchnorm` and `fat.kernels.ops`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from fat.kernels.families import BATCH_NORM, CONVOLUTION, WEIGHT_GRADIENT, launches
from fat.kernels.ops.checks import channels_last, check_depthwise_weight, check_feature_maps, empty_feature_map
from fat.kernels.ops.depthwise import depthwise_input_gradient


@custom_op("fat::depthwise_stats", mutates_args=())
@launches(CONVOLUTION, BATCH_NORM)
def depthwise_stats(
    x: Tensor, gelu_input: Tensor | None, weight: Tensor, bias: Tensor | None, stride: int, residual: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `depthwise`, and mean and biased variance of its stored result: fp32 [C]. Deterministic.

    gelu_input: if x = GELU(gelu_input), the gradient is propagated to it instead of to x.
    """
    from fat.kernels.impl.batchnorm import merge_stats
    from fat.kernels.impl.depthwise import convolve, tile_counts

    check_feature_maps(x, *(() if gelu_input is None else (gelu_input,)))
    check_depthwise_weight(weight, x, stride, residual)
    out = _out(x, stride)
    tiles = x.shape[0] * tile_counts(weight, out, stride)[0]
    stats = x.new_empty(tiles, 2, x.shape[1], dtype=torch.float32)
    counts = x.new_empty(tiles, dtype=torch.float32)
    convolve(x, weight, bias, out, stride=stride, residual=residual, stats=stats, counts=counts)
    return out, *merge_stats(stats, counts)


@depthwise_stats.register_fake
def _(
    x: Tensor, gelu_input: Tensor | None, weight: Tensor, bias: Tensor | None, stride: int, residual: bool
) -> tuple[Tensor, Tensor, Tensor]:
    mean, var = (x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(2))
    return _out(x, stride), mean, var


def _out(x: Tensor, stride: int) -> Tensor:
    return empty_feature_map(x, x.shape[0], x.shape[1], -(-x.shape[2] // stride), -(-x.shape[3] // stride))


@custom_op("fat::depthwise_stats_gradient", mutates_args=())
@launches(WEIGHT_GRADIENT, BATCH_NORM)
def depthwise_stats_gradient(
    grad_out: Tensor, x: Tensor, y: Tensor, mean: Tensor, grad_mean: Tensor, grad_var: Tensor, kernel: int, stride: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the complete gradient of y, including that through its mean and variance, and the gradients of weight and
    bias, fp32. y: the convolution's result."""
    from fat.kernels.impl.depthwise_weight_grad import Statistics, weight_gradient

    check_feature_maps(grad_out, x, y)
    completed = torch.empty_like(y)
    found = Statistics(y, mean, grad_mean, grad_var, completed)
    return completed, *weight_gradient(grad_out, x, kernel=kernel, stride=stride, statistics=found)


@depthwise_stats_gradient.register_fake
def _(
    grad_out: Tensor, x: Tensor, y: Tensor, mean: Tensor, grad_mean: Tensor, grad_var: Tensor, kernel: int, stride: int
) -> tuple[Tensor, Tensor, Tensor]:
    channels = x.shape[1]
    grad_weight = x.new_empty(channels, 1, kernel, kernel, dtype=torch.float32)
    return torch.empty_like(y), grad_weight, x.new_empty(channels, dtype=torch.float32)


def _keep_stats(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, gelu_input, weight, bias, ctx.stride, ctx.residual = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, gelu_input, weight, output[0], output[1])


def _stats_backward(ctx: Any, grad_y: Tensor, grad_mean: Tensor, grad_var: Tensor) -> tuple[Tensor | None, ...]:
    x, gelu_input, weight, y, mean = ctx.saved_tensors
    completed, grad_weight, grad_bias = depthwise_stats_gradient(
        channels_last(grad_y), x, y, mean, grad_mean.contiguous(), grad_var.contiguous(), weight.shape[-1], ctx.stride
    )
    grad_input = None
    if ctx.needs_input_grad[0 if gelu_input is None else 1]:
        grad_input = depthwise_input_gradient(completed, weight, gelu_input, *x.shape[2:], ctx.stride, ctx.residual)
    grad_x, grad_gelu_input = (grad_input, None) if gelu_input is None else (None, grad_input)
    grad_bias = None if ctx.bias_dtype is None else grad_bias.to(ctx.bias_dtype)
    return grad_x, grad_gelu_input, grad_weight.to(weight.dtype), grad_bias, None, None


depthwise_stats.register_autograd(_stats_backward, setup_context=_keep_stats)


@custom_op("fat::update_running_stats", mutates_args=("running_mean", "running_var", "batches"))
@launches(BATCH_NORM)
def update_running_stats(
    running_mean: Tensor,
    running_var: Tensor,
    batches: Tensor,
    drift: Tensor,
    var: Tensor,
    momentum: float,
    correction: float,
) -> None:
    """Update running statistics [C] and the batch counter in place.

    drift: mean of the batch minus running mean. var: biased variance; times `correction` it is unbiased.
    """
    from fat.kernels.impl import batchnorm as kernels

    kernels.update_running_stats(running_mean, running_var, batches, drift, var, momentum, correction)


@update_running_stats.register_fake
def _(*_: object) -> None:
    return None


@custom_op("fat::fold", mutates_args=())
@launches(BATCH_NORM)
def fold(
    weight: Tensor,
    bias: Tensor,
    gain: Tensor,
    shift: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Fold BatchNorm into a 1x1 convolution's weights [O, C, 1, 1] and bias [O], returned in dtype.

    gain, shift: BatchNorm's weight and bias, [C]. mean, var: fp32 [C].
    """
    from fat.kernels.impl import batchnorm as kernels

    _check_pointwise(weight, bias, gain, shift, mean, var)
    folded, folded_bias = _folded_shape(weight, bias, dtype=dtype)
    kernels.fold(weight, bias, gain, shift, mean, var, eps, folded, folded_bias)
    return folded, folded_bias


@fold.register_fake
def _(weight: Tensor, bias: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _folded_shape(weight, bias, dtype=rest[-1])


def _folded_shape(weight: Tensor, bias: Tensor, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight, dtype=dtype), torch.empty_like(bias, dtype=dtype)


@custom_op("fat::fold_gradient", mutates_args=())
@launches(BATCH_NORM)
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
    """Return the gradients of weight, gain, shift, mean and var (that of bias is grad_folded_bias)."""
    from fat.kernels.impl import batchnorm as kernels

    _check_pointwise(weight, grad_folded_bias, gain, shift, mean, var)
    return kernels.fold_gradient(grad_folded, grad_folded_bias, weight, gain, shift, mean, var, folded, eps)


@fold_gradient.register_fake
def _(_: Tensor, __: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(tensor) for tensor in rest[:5])


def _keep_fold(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    weight, bias, gain, shift, mean, var, ctx.eps, _ = inputs
    ctx.bias_dtype = bias.dtype
    ctx.save_for_backward(weight, gain, shift, mean, var, output[0])


def _fold_backward(ctx: Any, grad_folded: Tensor, grad_folded_bias: Tensor) -> tuple[Tensor | None, ...]:
    grad_folded, grad_folded_bias = grad_folded.flatten(1).contiguous(), grad_folded_bias.contiguous()
    grad_weight, *others = fold_gradient(grad_folded, grad_folded_bias, *ctx.saved_tensors, ctx.eps)
    return grad_weight, grad_folded_bias.to(ctx.bias_dtype), *others, None, None


fold.register_autograd(_fold_backward, setup_context=_keep_fold)


def _check_pointwise(weight: Tensor, bias: Tensor, *of_channels: Tensor) -> None:
    outputs, channels = weight.shape[:2]
    if weight.shape[2:] != (1, 1) or bias.shape != (outputs,) or any(t.shape != (channels,) for t in of_channels):
        raise ValueError(
            f"weights of shape {tuple(weight.shape)}, bias {tuple(bias.shape)}, norm {tuple(of_channels[0].shape)}: "
            "expected those of a 1x1 convolution, [O, C, 1, 1] and [O], and of BatchNorm before it, [C]"
        )
    if not weight.flatten(1).is_contiguous() or any(t.device != weight.device for t in (bias, *of_channels)):
        raise ValueError("weights of a 1x1 convolution and BatchNorm: expected contiguous tensors on one device")

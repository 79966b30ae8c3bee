"""Operators `fat::depthwise*`: depthwise convolution, alone and followed by FASA's gate. See `fat.kernels.ops`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from fat.kernels.families import CONVOLUTION, GATE, INPUT_GRADIENT, WEIGHT_GRADIENT, launches
from fat.kernels.ops.checks import channels_last, check_depthwise_weight, check_feature_maps, empty_feature_map


@custom_op("fat::depthwise", mutates_args=())
@launches(CONVOLUTION)
def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, residual: bool) -> Tensor:
    """Compute a depthwise k x k convolution with padding k // 2: [B, C, ceil(H / stride), ceil(W / stride)].

    residual: add x to the result; only with stride 1.
    """
    from fat.kernels.impl.depthwise import convolve

    check_feature_maps(x)
    check_depthwise_weight(weight, x, stride, residual)
    out = _depthwise_shape(x, weight, bias, stride, residual)
    convolve(x, weight, bias, out, stride=stride, residual=residual)
    return out


@depthwise.register_fake
def _depthwise_shape(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, residual: bool) -> Tensor:
    return empty_feature_map(x, x.shape[0], x.shape[1], -(-x.shape[2] // stride), -(-x.shape[3] // stride))


@custom_op("fat::depthwise_input_gradient", mutates_args=())
@launches(INPUT_GRADIENT)
def depthwise_input_gradient(
    grad_out: Tensor, weight: Tensor, gelu_input: Tensor | None, height: int, width: int, stride: int, residual: bool
) -> Tensor:
    """Return the gradient of the input of `depthwise`: [B, C, height, width].

    gelu_input: if x = GELU(gelu_input), return the gradient of gelu_input instead of that of x.
    """
    from fat.kernels.impl.depthwise import input_gradient

    check_feature_maps(grad_out, *(() if gelu_input is None else (gelu_input,)))
    check_depthwise_weight(weight, grad_out, stride, residual)
    out = _input_gradient_shape(grad_out, weight, gelu_input, height, width, stride, residual)
    input_gradient(grad_out, weight, gelu_input, out, stride=stride, residual=residual)
    return out


@depthwise_input_gradient.register_fake
def _input_gradient_shape(
    grad_out: Tensor, weight: Tensor, gelu_input: Tensor | None, height: int, width: int, stride: int, residual: bool
) -> Tensor:
    return empty_feature_map(grad_out, grad_out.shape[0], grad_out.shape[1], height, width)


@custom_op("fat::depthwise_weight_gradient", mutates_args=())
@launches(WEIGHT_GRADIENT)
def depthwise_weight_gradient(grad_out: Tensor, x: Tensor, kernel: int, stride: int) -> tuple[Tensor, Tensor]:
    """Return the gradients of weight, fp32 [C, 1, kernel, kernel], and bias, fp32 [C]. Deterministic."""
    from fat.kernels.impl.depthwise_weight_grad import weight_gradient

    check_feature_maps(grad_out, x)
    return weight_gradient(grad_out, x, kernel=kernel, stride=stride)


@depthwise_weight_gradient.register_fake
def _weight_gradient_shape(grad_out: Tensor, x: Tensor, kernel: int, stride: int) -> tuple[Tensor, Tensor]:
    channels = x.shape[1]
    return (
        x.new_empty(channels, 1, kernel, kernel, dtype=torch.float32),
        x.new_empty(channels, dtype=torch.float32),
    )


def _keep_depthwise(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, bias, ctx.stride, ctx.residual = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight)


def _depthwise_backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = convolution_gradients(
        grad_out, x, weight, ctx.bias_dtype, ctx.needs_input_grad[:3], ctx.stride, ctx.residual
    )
    return grad_x, grad_weight, grad_bias, None, None


depthwise.register_autograd(_depthwise_backward, setup_context=_keep_depthwise)


def convolution_gradients(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_dtype: torch.dtype | None,
    needed: tuple[bool, bool, bool],
    stride: int,
    residual: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, weight and bias; None for those that are not needed."""
    grad_out = channels_last(grad_out)
    grad_x = grad_weight = grad_bias = None
    if needed[0]:
        grad_x = depthwise_input_gradient(grad_out, weight, None, *x.shape[2:], stride, residual)
    if needed[1] or needed[2]:
        grad_weight, grad_bias = depthwise_weight_gradient(grad_out, x, weight.shape[-1], stride)
        grad_weight = grad_weight.to(weight.dtype)
        grad_bias = None if bias_dtype is None else grad_bias.to(bias_dtype)
    return grad_x, grad_weight, grad_bias


# Depthwise convolution followed by FASA's gate: SiLU(depthwise(q)) * SiLU(other)


@custom_op("fat::depthwise_gate", mutates_args=())
@launches(CONVOLUTION, GATE)
def depthwise_gate(q: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor) -> Tensor:
    """Compute SiLU(depthwise(q)) * SiLU(other) with stride 1. q and other have the same shape and dtype."""
    from fat.kernels.impl.depthwise import GATE, convolve

    check_feature_maps(q, other)
    check_depthwise_weight(weight, q, 1, False)
    out = torch.empty_like(q)
    convolve(q, weight, bias, out, epilogue=GATE, gate=other)
    return out


@depthwise_gate.register_fake
def _(q: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor) -> Tensor:
    return torch.empty_like(q)


@custom_op("fat::depthwise_gate_gradient", mutates_args=())
@launches(CONVOLUTION, GATE)
def depthwise_gate_gradient(
    grad_out: Tensor, q: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of depthwise(q), which is recomputed, and of other."""
    from fat.kernels.impl.depthwise import GATE_GRADIENT, convolve

    check_feature_maps(grad_out, q, other)
    check_depthwise_weight(weight, q, 1, False)
    grad_local, grad_other = torch.empty_like(q), torch.empty_like(other)
    convolve(q, weight, bias, grad_local, epilogue=GATE_GRADIENT, gate=other, grad_out=grad_out, gate_out=grad_other)
    return grad_local, grad_other


@depthwise_gate_gradient.register_fake
def _(grad_out: Tensor, q: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(other)


def _keep_depthwise_gate(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _depthwise_gate_backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    q, weight, bias, other = ctx.saved_tensors
    grad_local, grad_other = depthwise_gate_gradient(channels_last(grad_out), q, weight, bias, other)
    bias_dtype = None if bias is None else bias.dtype
    grad_q, grad_weight, grad_bias = convolution_gradients(
        grad_local, q, weight, bias_dtype, ctx.needs_input_grad[:3], 1, False
    )
    return grad_q, grad_weight, grad_bias, grad_other


depthwise_gate.register_autograd(_depthwise_gate_backward, setup_context=_keep_depthwise_gate)

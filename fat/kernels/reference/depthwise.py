"""Reference implementation of the depthwise convolution, alone and followed by FASA's gate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fat.kernels.reference.gate import multiply_silus, multiply_silus_gradient
from fat.kernels.reference.precision import as_float32, as_map, in_nchw, sum_dtype

aten: Any = torch.ops.aten


def depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, residual: bool, *, kernel_out: Tensor | None = None
) -> Tensor:
    return as_map(_convolve(x, weight, bias, stride, residual, sum_dtype(kernel_out)), x.dtype, kernel_out)


def depthwise_input_gradient(
    grad_out: Tensor,
    weight: Tensor,
    gelu_input: Tensor | None,
    height: int,
    width: int,
    stride: int,
    residual: bool,
    *,
    kernel_out: Tensor | None = None,
) -> Tensor:
    wide = sum_dtype(kernel_out)
    wide_grad = in_nchw(grad_out, wide)
    x = wide_grad.new_empty(grad_out.shape[0], grad_out.shape[1], height, width)  # only the shape of x is used
    grad_x = _backward(wide_grad, x, weight.to(wide), stride, needed=(True, False))[0]
    grad_x = grad_x + wide_grad if residual else grad_x
    if gelu_input is not None:
        grad_x = aten.gelu_backward(grad_x, in_nchw(gelu_input, wide))
    return as_map(grad_x, grad_out.dtype, kernel_out)


def depthwise_weight_gradient(
    grad_out: Tensor, x: Tensor, kernel: int, stride: int, *, kernel_out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    wide = sum_dtype(kernel_out)
    return weight_and_bias_gradient(in_nchw(grad_out, wide), x, kernel, stride, kernel_out)


def depthwise_gate(
    q: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor, *, kernel_out: Tensor | None = None
) -> Tensor:
    wide = sum_dtype(kernel_out)
    return as_map(multiply_silus(_convolve(q, weight, bias, 1, False, wide), other.to(wide)), q.dtype, kernel_out)


def depthwise_gate_gradient(
    grad_out: Tensor, q: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor, *, kernel_out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    wide = sum_dtype(kernel_out)
    local = _convolve(q, weight, bias, 1, False, wide)
    grad_local, grad_other = multiply_silus_gradient(grad_out.to(wide), local, other.to(wide))
    return as_map(grad_local, q.dtype, kernel_out), as_map(grad_other, other.dtype, kernel_out)


def weight_and_bias_gradient(
    grad_out: Tensor, x: Tensor, kernel: int, stride: int, kernel_out: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the gradients of a depthwise convolution's weight and bias."""
    weight = grad_out.new_zeros(x.shape[1], 1, kernel, kernel)
    _, grad_weight, grad_bias = _backward(grad_out, in_nchw(x, grad_out.dtype), weight, stride, needed=(False, True))
    return as_float32(grad_weight, kernel_out).contiguous(), as_float32(grad_bias, kernel_out)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, residual: bool, wide: torch.dtype) -> Tensor:
    x, padding = in_nchw(x, wide), weight.shape[-1] // 2
    bias = None if bias is None else bias.to(wide)
    out = torch.conv2d(x, weight.to(wide), bias, stride, padding, groups=x.shape[1])
    return x + out if residual else out


def _backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, stride: int, *, needed: tuple[bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of a depthwise convolution's input, weight and bias.

    needed: whether to compute the gradient of x, and whether to compute those of weight and bias.
    """
    padding, channels = weight.shape[-1] // 2, x.shape[1]
    geometry = ([stride] * 2, [padding] * 2, [1, 1], False, [0, 0], channels)
    found: tuple[Tensor, Tensor, Tensor] = aten.convolution_backward(
        grad_out, x, weight, [channels], *geometry, [needed[0], needed[1], needed[1]]
    )
    return found

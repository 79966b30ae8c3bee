"""Depthwise convolution, alone and with the gate behind it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fat.kernels.reference.gate import multiply_silus, multiply_silus_gradient
from fat.kernels.reference.precision import as_float32, as_map, in_nchw, sum_dtype

aten: Any = torch.ops.aten


def depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, residual: bool, *, own: Tensor | None = None
) -> Tensor:
    return as_map(_convolve(x, weight, bias, stride, residual, sum_dtype(own)), x.dtype, own)


def depthwise_input_gradient(
    gradient: Tensor,
    weight: Tensor,
    before: Tensor | None,
    height: int,
    width: int,
    stride: int,
    residual: bool,
    *,
    own: Tensor | None = None,
) -> Tensor:
    wide = sum_dtype(own)
    grad_out = in_nchw(gradient, wide)
    x = grad_out.new_empty(gradient.shape[0], gradient.shape[1], height, width)  # only its shape matters
    grad_x = _backward(grad_out, x, weight.to(wide), stride, needed=(True, False))[0]
    grad_x = grad_x + grad_out if residual else grad_x
    if before is not None:
        grad_x = aten.gelu_backward(grad_x, in_nchw(before, wide))
    return as_map(grad_x, gradient.dtype, own)


def depthwise_weight_gradient(
    gradient: Tensor, x: Tensor, kernel: int, stride: int, *, own: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    wide = sum_dtype(own)
    return weight_and_bias_gradient(in_nchw(gradient, wide), x, kernel, stride, own)


def depthwise_gate(
    q: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor, *, own: Tensor | None = None
) -> Tensor:
    wide = sum_dtype(own)
    return as_map(multiply_silus(_convolve(q, weight, bias, 1, False, wide), other.to(wide)), q.dtype, own)


def depthwise_gate_gradient(
    gradient: Tensor, q: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor, *, own: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    wide = sum_dtype(own)
    local = _convolve(q, weight, bias, 1, False, wide)
    grad_local, grad_other = multiply_silus_gradient(gradient.to(wide), local, other.to(wide))
    return as_map(grad_local, q.dtype, own), as_map(grad_other, other.dtype, own)


def weight_and_bias_gradient(
    grad_out: Tensor, x: Tensor, kernel: int, stride: int, own: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the gradients of a depthwise convolution by its weight and bias."""
    weight = grad_out.new_zeros(x.shape[1], 1, kernel, kernel)
    _, grad_weight, grad_bias = _backward(grad_out, in_nchw(x, grad_out.dtype), weight, stride, needed=(False, True))
    return as_float32(grad_weight, own).contiguous(), as_float32(grad_bias, own)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, residual: bool, wide: torch.dtype) -> Tensor:
    x, padding = in_nchw(x, wide), weight.shape[-1] // 2
    bias = None if bias is None else bias.to(wide)
    out = torch.conv2d(x, weight.to(wide), bias, stride, padding, groups=x.shape[1])
    return x + out if residual else out


def _backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, stride: int, *, needed: tuple[bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of a depthwise convolution by x (if the first is needed), weight and bias (if the second is)."""
    padding, channels = weight.shape[-1] // 2, x.shape[1]
    geometry = ([stride] * 2, [padding] * 2, [1, 1], False, [0, 0], channels)
    found: tuple[Tensor, Tensor, Tensor] = aten.convolution_backward(
        grad_out, x, weight, [channels], *geometry, [needed[0], needed[1], needed[1]]
    )
    return found

"""Reference implementation of BatchNorm between a depthwise and a 1x1 convolution."""

from __future__ import annotations

import torch
from torch import Tensor

from fat.kernels.reference.depthwise import depthwise, weight_and_bias_gradient
from fat.kernels.reference.precision import as_map, in_nchw, per_channel, sum_dtype


def depthwise_stats(
    x: Tensor,
    gelu_input: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    residual: bool,
    *,
    kernel_out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    out = depthwise(x, weight, bias, stride, residual, kernel_out=kernel_out)
    stored = (out if kernel_out is None else kernel_out).to(sum_dtype(kernel_out))
    var, mean = torch.var_mean(stored, dim=(0, 2, 3), correction=0)
    return out, mean, var


def depthwise_stats_gradient(
    grad_out: Tensor,
    x: Tensor,
    y: Tensor,
    mean: Tensor,
    grad_mean: Tensor,
    grad_var: Tensor,
    kernel: int,
    stride: int,
    *,
    kernel_out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = sum_dtype(kernel_out)
    count = y.numel() // y.shape[1]
    slope = grad_var.to(wide) * (2 / count)
    shift = grad_mean.to(wide) / count - slope * mean.to(wide)
    grad_y = in_nchw(grad_out, wide) + (in_nchw(y, wide) * per_channel(slope) + per_channel(shift))
    return as_map(grad_y, y.dtype, kernel_out), *weight_and_bias_gradient(grad_y, x, kernel, stride, kernel_out)


def update_running_stats(
    running_mean: Tensor,
    running_var: Tensor,
    batches: Tensor,
    drift: Tensor,
    var: Tensor,
    momentum: float,
    correction: float,
    *,
    kernel_out: Tensor | None = None,
) -> None:
    running_mean.add_(drift, alpha=momentum)
    running_var.lerp_(var * correction, momentum)
    batches.add_(1)


def fold(
    weight: Tensor,
    bias: Tensor,
    gain: Tensor,
    shift: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    dtype: torch.dtype,
    *,
    kernel_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    wide = sum_dtype(kernel_out)
    matrix = weight.flatten(1).to(wide)
    product = matrix * (gain.to(wide) * (var.to(wide) + eps).rsqrt())
    folded = product.to(dtype) if kernel_out is None else kernel_out.flatten(1)
    total = bias.to(wide) + (matrix * shift.to(wide) - folded.to(wide) * mean.to(wide)).sum(1)
    if kernel_out is None:
        return torch.empty_like(weight, dtype=dtype).copy_(folded.view_as(weight)), total.to(dtype)
    return product.view(weight.shape), total


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
    *,
    kernel_out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = sum_dtype(kernel_out)
    outputs = weight.shape[0]
    matrix, grad_bias = weight.flatten(1).to(wide), grad_folded_bias.to(wide)[:, None]
    rstd = (var.to(wide) + eps).rsqrt()
    grad_out = grad_folded.reshape(outputs, -1).to(wide) - grad_bias * mean.to(wide)
    grad_scale = (grad_out * matrix).sum(0)
    results = (
        (grad_out * (gain.to(wide) * rstd) + grad_bias * shift.to(wide)).view(weight.shape),
        grad_scale * rstd,
        (grad_bias * matrix).sum(0),
        -(grad_bias * folded.reshape(outputs, -1).to(wide)).sum(0),
        grad_scale * gain.to(wide) * rstd**3 * -0.5,
    )
    if kernel_out is not None:
        return results
    likes = (weight, gain, shift, mean, var)
    return tuple(torch.empty_like(a).copy_(b) for a, b in zip(likes, results, strict=True))  # type: ignore[return-value]

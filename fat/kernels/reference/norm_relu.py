"""Reference implementation of BatchNorm and ReLU after a dense convolution."""

from __future__ import annotations

import torch
from torch import Tensor

from fat.kernels.reference.precision import as_float32, as_map, per_channel, sum_dtype


def channel_stats(x: Tensor, *, kernel_out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(x.to(sum_dtype(kernel_out)), dim=(0, 2, 3), correction=0)
    return mean, var


def norm_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    *,
    kernel_out: Tensor | None = None,
) -> Tensor:
    wide = sum_dtype(kernel_out)
    scale = weight.to(wide) * (var.to(wide) + eps).rsqrt()
    found = (x.to(wide) - per_channel(mean.to(wide))) * per_channel(scale) + per_channel(bias.to(wide))
    return as_map(found.clamp_min(0), x.dtype, kernel_out)


def norm_relu_sums(
    grad_out: Tensor,
    x: Tensor,
    result: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    *,
    kernel_out: Tensor | None = None,
) -> Tensor:
    grad_out, normal, _ = _norm_relu_parts(grad_out, x, result, mean, var, eps, sum_dtype(kernel_out))
    return as_float32(torch.stack([grad_out.sum(dim=(0, 2, 3)), (grad_out * normal).sum(dim=(0, 2, 3))]), kernel_out)


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
    *,
    kernel_out: Tensor | None = None,
) -> Tensor:
    wide = sum_dtype(kernel_out)
    grad_out, normal, rstd = _norm_relu_parts(grad_out, x, result, mean, var, eps, wide)
    found = grad_out - per_channel(grad_bias.to(wide) / count) - normal * per_channel(grad_weight.to(wide) / count)
    return as_map(found * per_channel(weight.to(wide) * rstd), x.dtype, kernel_out)


def _norm_relu_parts(
    grad_out: Tensor, x: Tensor, result: Tensor, mean: Tensor, var: Tensor, eps: float, wide: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of ReLU's input, normalized x, and the reciprocal standard deviation."""
    rstd = (var.to(wide) + eps).rsqrt()
    normal = (x.to(wide) - per_channel(mean.to(wide))) * per_channel(rstd)
    return grad_out.to(wide).masked_fill(result <= 0, 0.0), normal, rstd

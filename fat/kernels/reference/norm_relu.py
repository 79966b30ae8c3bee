"""BatchNorm and ReLU behind a dense convolution."""

from __future__ import annotations

import torch
from torch import Tensor

from fat.kernels.reference.precision import as_float32, as_map, per_channel, sum_dtype


def channel_stats(x: Tensor, *, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(x.to(sum_dtype(own)), dim=(0, 2, 3), correction=0)
    return mean, var


def norm_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    *,
    own: Tensor | None = None,
) -> Tensor:
    wide = sum_dtype(own)
    scale = weight.to(wide) * (var.to(wide) + eps).rsqrt()
    found = (x.to(wide) - per_channel(mean.to(wide))) * per_channel(scale) + per_channel(bias.to(wide))
    return as_map(found.clamp_min(0), x.dtype, own)


def norm_relu_sums(
    gradient: Tensor,
    x: Tensor,
    result: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    *,
    own: Tensor | None = None,
) -> Tensor:
    grad_out, normal, _ = _norm_relu_parts(gradient, x, result, mean, var, eps, sum_dtype(own))
    return as_float32(torch.stack([grad_out.sum(dim=(0, 2, 3)), (grad_out * normal).sum(dim=(0, 2, 3))]), own)


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
    *,
    own: Tensor | None = None,
) -> Tensor:
    wide = sum_dtype(own)
    grad_out, normal, rstd = _norm_relu_parts(gradient, x, result, mean, var, eps, wide)
    found = grad_out - per_channel(grad_bias.to(wide) / count) - normal * per_channel(grad_weight.to(wide) / count)
    return as_map(found * per_channel(weight.to(wide) * rstd), x.dtype, own)


def _norm_relu_parts(
    gradient: Tensor, x: Tensor, result: Tensor, mean: Tensor, var: Tensor, eps: float, wide: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient that ReLU lets through, the normalised x, and the reciprocal standard deviation."""
    rstd = (var.to(wide) + eps).rsqrt()
    normal = (x.to(wide) - per_channel(mean.to(wide))) * per_channel(rstd)
    return gradient.to(wide).masked_fill(result <= 0, 0.0), normal, rstd

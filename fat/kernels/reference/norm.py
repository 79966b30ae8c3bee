"""Reference implementation of GroupNorm with one group, and of the residual add."""

from __future__ import annotations

import torch
from torch import Tensor

from fat.kernels.reference.depthwise import depthwise
from fat.kernels.reference.precision import as_float32, as_map, per_channel, scale_samples, sum_dtype


def norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, kernel_out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    return _normalize(x, weight, bias, eps, kernel_out)


def add(x: Tensor, branch: Tensor, scale: Tensor | None, *, kernel_out: Tensor | None = None) -> Tensor:
    wide = sum_dtype(kernel_out)
    return as_map(x.to(wide) + scale_samples(branch.to(wide), scale), x.dtype, kernel_out)


def scaled(x: Tensor, scale: Tensor, *, kernel_out: Tensor | None = None) -> Tensor:
    return as_map(scale_samples(x.to(sum_dtype(kernel_out)), scale), x.dtype, kernel_out)


def add_norm(
    x: Tensor,
    branch: Tensor,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    kernel_out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = add(x, branch, scale, kernel_out=kernel_out)
    return total, *_normalize(total if kernel_out is None else kernel_out, weight, bias, eps, kernel_out)


def depthwise_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    *,
    kernel_out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = depthwise(x, weight, bias, 1, True, kernel_out=kernel_out)
    return total, *_normalize(total if kernel_out is None else kernel_out, norm_weight, norm_bias, eps, kernel_out)


def norm_gradient(
    grad_out: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    *,
    kernel_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    grad_x, affine = _norm_gradient(grad_out, x, mean, rstd, weight, residual, sum_dtype(kernel_out))
    return as_map(grad_x, x.dtype, kernel_out), as_float32(affine, kernel_out)


def add_norm_gradient(
    grad_out: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    residual: Tensor,
    scale: Tensor | None,
    dtype: torch.dtype,
    *,
    kernel_out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, affine = _norm_gradient(grad_out, x, mean, rstd, weight, residual, sum_dtype(kernel_out))
    grad_branch = as_map(scale_samples(grad_x, scale), dtype, kernel_out)
    return as_map(grad_x, x.dtype, kernel_out), grad_branch, as_float32(affine, kernel_out)


def _normalize(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, kernel_out: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    wide = sum_dtype(kernel_out)
    value = x.to(wide)
    var, mean = torch.var_mean(value, dim=(1, 2, 3), correction=0)
    rstd = (var + eps).rsqrt()
    normal = scale_samples(value - mean.view(-1, 1, 1, 1), rstd)
    out = normal * per_channel(weight.to(wide)) + per_channel(bias.to(wide))
    return as_map(out, x.dtype, kernel_out), mean, rstd


def _norm_gradient(
    grad_out: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    wide: torch.dtype,
) -> tuple[Tensor, Tensor]:
    grad_out = grad_out.to(wide)
    normal = scale_samples(x.to(wide) - mean.to(wide).view(-1, 1, 1, 1), rstd)
    grad = grad_out * per_channel(weight.to(wide))
    means = [t.mean(dim=(1, 2, 3), keepdim=True) for t in (grad, grad * normal)]
    grad_x = scale_samples(grad - means[0] - normal * means[1], rstd)
    if residual is not None:
        grad_x = grad_x + residual.to(wide)
    return grad_x, torch.stack([(grad_out * normal).sum(dim=(0, 2, 3)), grad_out.sum(dim=(0, 2, 3))])

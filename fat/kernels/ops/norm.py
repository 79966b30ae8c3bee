"""Operators `fat::*norm*` and `fat::add`: GroupNorm with one group, alone or after a residual add or a convolution. See
`fat.kernels.ops`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from fat.kernels.families import CONVOLUTION, NORM, launches
from fat.kernels.ops.checks import channels_last, check_depthwise_weight, check_feature_maps
from fat.kernels.ops.depthwise import convolution_gradients


@custom_op("fat::norm", mutates_args=())
@launches(NORM)
def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return normalized x, its mean, fp32 [B], and its reciprocal standard deviation, fp32 [B]."""
    from fat.kernels.impl import norm as kernels

    check_feature_maps(x)
    stats = kernels.add(x, None, None, x, with_stats=True)
    assert stats is not None
    out = torch.empty_like(x)
    return out, *kernels.normalize(x, stats, weight, bias, out, eps)


@norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), *_statistics(x)


@custom_op("fat::add", mutates_args=())
@launches(NORM)
def add(x: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
    """Return x + scale * branch in x's dtype. scale: fp32 [B]; None: 1."""
    from fat.kernels.impl import norm as kernels

    check_feature_maps(x)
    check_feature_maps(branch)
    out = torch.empty_like(x)
    kernels.add(x, branch, scale, out, with_stats=False)
    return out


@add.register_fake
def _(x: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
    return torch.empty_like(x)


@custom_op("fat::scaled", mutates_args=())
@launches(NORM)
def scaled(x: Tensor, scale: Tensor) -> Tensor:
    """Return scale * x in x's dtype. scale: fp32 [B]."""
    from fat.kernels.impl import norm as kernels

    check_feature_maps(x)
    out = torch.empty_like(x)
    kernels.add(None, x, scale, out, with_stats=False)
    return out


@scaled.register_fake
def _(x: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(x)


@custom_op("fat::add_norm", mutates_args=())
@launches(NORM)
def add_norm(
    x: Tensor, branch: Tensor, scale: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y = `add` of x and branch, and `norm` of y: (y, normalized y, mean, reciprocal standard deviation)."""
    from fat.kernels.impl import norm as kernels

    check_feature_maps(x)
    check_feature_maps(branch)
    total, out = torch.empty_like(x), torch.empty_like(x)
    stats = kernels.add(x, branch, scale, total, with_stats=True)
    assert stats is not None
    return total, out, *kernels.normalize(total, stats, weight, bias, out, eps)


@add_norm.register_fake
def _(
    x: Tensor, branch: Tensor, scale: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x), *_statistics(x)


@custom_op("fat::depthwise_norm", mutates_args=())
@launches(CONVOLUTION, NORM)
def depthwise_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y = x + depthwise(x), and `norm` of y: (y, normalized y, mean, reciprocal standard deviation)."""
    from fat.kernels.impl import norm as kernels
    from fat.kernels.impl.depthwise import convolve, tile_counts

    check_feature_maps(x)
    check_depthwise_weight(weight, x, 1, True)
    total, out = torch.empty_like(x), torch.empty_like(x)
    tiles, deep = tile_counts(weight, total)
    stats = x.new_empty(x.shape[0], tiles * deep, 3, dtype=torch.float32)
    convolve(x, weight, bias, total, residual=True, stats=stats)
    return total, out, *kernels.normalize(total, stats, norm_weight, norm_bias, out, eps)


@depthwise_norm.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x), *_statistics(x)


@custom_op("fat::norm_gradient", mutates_args=())
@launches(NORM)
def norm_gradient(
    grad_out: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the gradient of the input of `norm`, plus `residual`, and those of weight and bias, fp32 [2, C].

    Deterministic.
    """
    from fat.kernels.impl import norm as kernels

    check_feature_maps(grad_out, x, *(() if residual is None else (residual,)))
    out = torch.empty_like(x)
    return out, kernels.gradients(grad_out, x, mean, rstd, weight, residual, None, out, None)


@norm_gradient.register_fake
def _(
    grad_out: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), _affine(weight)


@custom_op("fat::add_norm_gradient", mutates_args=())
@launches(NORM)
def add_norm_gradient(
    grad_out: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    residual: Tensor,
    scale: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Like `norm_gradient`, with scale times its first result inserted as the second result, in dtype.

    dtype: dtype of the branch.
    """
    from fat.kernels.impl import norm as kernels

    check_feature_maps(grad_out, x, residual)
    out, branch_out = torch.empty_like(x), torch.empty_like(x, dtype=dtype)
    return out, branch_out, kernels.gradients(grad_out, x, mean, rstd, weight, residual, scale, out, branch_out)


@add_norm_gradient.register_fake
def _(
    grad_out: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    residual: Tensor,
    scale: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x, dtype=dtype), _affine(weight)


def _keep_norm(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, bias, _ = inputs
    _, mean, rstd = output
    ctx.bias_dtype = bias.dtype
    ctx.set_materialize_grads(False)  # avoids kernels that would write zeros as the gradients of mean and rstd
    ctx.save_for_backward(x, mean, rstd, weight)


def _norm_backward(ctx: Any, grad_out: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, mean, rstd, weight = ctx.saved_tensors
    grad_x, affine = norm_gradient(channels_last(grad_out), x, mean, rstd, weight, None)
    return grad_x, affine[0].to(weight.dtype), affine[1].to(ctx.bias_dtype), None


norm.register_autograd(_norm_backward, setup_context=_keep_norm)


def _keep_add(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, branch, scale = inputs
    ctx.branch_dtype = branch.dtype
    ctx.save_for_backward(scale)


def _add_backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    (scale,) = ctx.saved_tensors
    grad_out = channels_last(grad_out)
    grad_branch = grad_out if scale is None else scaled(grad_out, scale)
    return grad_out, grad_branch.to(ctx.branch_dtype), None


add.register_autograd(_add_backward, setup_context=_keep_add)


def _keep_add_norm(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, branch, scale, weight, bias, _ = inputs
    total, _, mean, rstd = output
    ctx.branch_dtype, ctx.bias_dtype = branch.dtype, bias.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(total, mean, rstd, weight, scale)


def _add_norm_backward(
    ctx: Any, residual: Tensor | None, grad_out: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    total, mean, rstd, weight, scale = ctx.saved_tensors
    grad_out, residual = _dense(grad_out, total), _dense(residual, total)
    if scale is None and ctx.branch_dtype == total.dtype:
        grad_x, affine = norm_gradient(grad_out, total, mean, rstd, weight, residual)
        grad_branch = grad_x
    else:
        grad_x, grad_branch, affine = add_norm_gradient(
            grad_out, total, mean, rstd, weight, residual, scale, ctx.branch_dtype
        )
    return grad_x, grad_branch, None, affine[0].to(weight.dtype), affine[1].to(ctx.bias_dtype), None


add_norm.register_autograd(_add_norm_backward, setup_context=_keep_add_norm)


def _keep_depthwise_norm(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, bias, norm_weight, norm_bias, _ = inputs
    total, _, mean, rstd = output
    ctx.bias_dtype, ctx.norm_bias_dtype = None if bias is None else bias.dtype, norm_bias.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, total, mean, rstd, norm_weight)


def _depthwise_norm_backward(
    ctx: Any, residual: Tensor | None, grad_out: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    x, weight, total, mean, rstd, norm_weight = ctx.saved_tensors
    grad_out, residual = _dense(grad_out, total), _dense(residual, total)
    grad_total, affine = norm_gradient(grad_out, total, mean, rstd, norm_weight, residual)
    grad_x, grad_weight, grad_bias = convolution_gradients(
        grad_total, x, weight, ctx.bias_dtype, ctx.needs_input_grad[:3], 1, True
    )
    grad_norm_weight, grad_norm_bias = affine[0].to(norm_weight.dtype), affine[1].to(ctx.norm_bias_dtype)
    return grad_x, grad_weight, grad_bias, grad_norm_weight, grad_norm_bias, None


depthwise_norm.register_autograd(_depthwise_norm_backward, setup_context=_keep_depthwise_norm)


def _dense(grad_out: Tensor | None, like: Tensor) -> Tensor:
    """Return the gradient in channels-last memory, or zeros if it is None, which means that the result was not used."""
    return torch.zeros_like(like) if grad_out is None else channels_last(grad_out)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], dtype=torch.float32), x.new_empty(x.shape[0], dtype=torch.float32)


def _affine(weight: Tensor) -> Tensor:
    return weight.new_empty(2, weight.shape[0], dtype=torch.float32)

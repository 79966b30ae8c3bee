"""What every operator `fat::*` returns, in plain torch: one function per operator, with the operator's arguments.

It has two uses. An operator whose kernel family is switched off (`fat.kernels.families`) runs these functions instead
of the Triton kernels: sums in float32, results rounded once to the operator's dtypes, maps in channels-last memory. The
self-check (`fat.kernels.selfcheck`) compares the kernels with them in float64: with `own`, the operator's own first
result, nothing is rounded, and what the operator computes from its stored first result is computed from `own`.

None of the functions is differentiable: the operators have autograd formulas of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fat.kernels.ops.checks import channels_last

aten: Any = torch.ops.aten


# Depthwise convolution


def depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, residual: bool, *, own: Tensor | None = None
) -> Tensor:
    return _map(_convolve(x, weight, bias, stride, residual, _wide(own)), x.dtype, own)


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
    wide = _wide(own)
    grad_out = _contiguous(gradient, wide)
    x = grad_out.new_empty(gradient.shape[0], gradient.shape[1], height, width)  # only its shape matters
    grad_x = _backward(grad_out, x, weight.to(wide), stride, needed=(True, False))[0]
    grad_x = grad_x + grad_out if residual else grad_x
    if before is not None:
        grad_x = aten.gelu_backward(grad_x, _contiguous(before, wide))
    return _map(grad_x, gradient.dtype, own)


def depthwise_weight_gradient(
    gradient: Tensor, x: Tensor, kernel: int, stride: int, *, own: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    wide = _wide(own)
    return _weight_gradient(_contiguous(gradient, wide), x, kernel, stride, own)


def depthwise_gate(
    q: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor, *, own: Tensor | None = None
) -> Tensor:
    wide = _wide(own)
    return _map(_gate(_convolve(q, weight, bias, 1, False, wide), other.to(wide)), q.dtype, own)


def depthwise_gate_gradient(
    gradient: Tensor, q: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor, *, own: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    wide = _wide(own)
    local = _convolve(q, weight, bias, 1, False, wide)
    grad_local, grad_other = _gate_gradient(gradient.to(wide), local, other.to(wide))
    return _map(grad_local, q.dtype, own), _map(grad_other, other.dtype, own)


def gate(local: Tensor, other: Tensor, *, own: Tensor | None = None) -> Tensor:
    wide = _wide(own)
    return _map(_gate(local.to(wide), other.to(wide)), local.dtype, own)


def gate_gradient(
    gradient: Tensor, local: Tensor, other: Tensor, *, own: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    wide = _wide(own)
    grad_local, grad_other = _gate_gradient(gradient.to(wide), local.to(wide), other.to(wide))
    return _map(grad_local, local.dtype, own), _map(grad_other, other.dtype, own)


# Attention to the keys of a pooled map


def attend(q: Tensor, kv: Tensor, heads: int, scale: float, *, own: Tensor | None = None) -> Tensor:
    wide = _wide(own)
    query, key, value = _heads(q, kv, heads, wide)
    return _map(_joined((query @ key.mT * scale).softmax(-1) @ value, q), q.dtype, own)


def attend_gradient(
    gradient: Tensor, q: Tensor, kv: Tensor, heads: int, scale: float, *, own: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    wide = _wide(own)
    query, key, value = _heads(q, kv, heads, wide)
    grad_out = _split(gradient.to(wide), heads)
    weights = (query @ key.mT * scale).softmax(-1)
    slopes = grad_out @ value.mT
    slopes = weights * (slopes - (weights * slopes).sum(-1, keepdim=True)) * scale
    grad_keys, grad_values = (_joined(product, kv) for product in (slopes.mT @ query, weights.mT @ grad_out))
    return _map(_joined(slopes @ key, q), q.dtype, own), _map(torch.cat([grad_keys, grad_values], 1), kv.dtype, own)


# GroupNorm with one group, and the residual add


def norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, own: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    return _normalise(x, weight, bias, eps, own)


def add(x: Tensor, branch: Tensor, scale: Tensor | None, *, own: Tensor | None = None) -> Tensor:
    wide = _wide(own)
    return _map(x.to(wide) + _times(branch.to(wide), scale), x.dtype, own)


def scaled(x: Tensor, scale: Tensor, *, own: Tensor | None = None) -> Tensor:
    return _map(_times(x.to(_wide(own)), scale), x.dtype, own)


def add_norm(
    x: Tensor,
    branch: Tensor,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    own: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = add(x, branch, scale, own=own)
    return total, *_normalise(total if own is None else own, weight, bias, eps, own)


def depthwise_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    *,
    own: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = depthwise(x, weight, bias, 1, True, own=own)
    return total, *_normalise(total if own is None else own, norm_weight, norm_bias, eps, own)


def norm_gradient(
    gradient: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    *,
    own: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    grad_x, affine = _norm_gradient(gradient, x, mean, rstd, weight, residual, _wide(own))
    return _map(grad_x, x.dtype, own), _numbers(affine, own)


def add_norm_gradient(
    gradient: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    residual: Tensor,
    scale: Tensor | None,
    dtype: torch.dtype,
    *,
    own: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, affine = _norm_gradient(gradient, x, mean, rstd, weight, residual, _wide(own))
    return _map(grad_x, x.dtype, own), _map(_times(grad_x, scale), dtype, own), _numbers(affine, own)


# BatchNorm between a depthwise and a 1x1 convolution


def depthwise_moments(
    x: Tensor,
    before: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    residual: bool,
    *,
    own: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    out = depthwise(x, weight, bias, stride, residual, own=own)
    stored = (out if own is None else own).to(_wide(own))
    var, mean = torch.var_mean(stored, dim=(0, 2, 3), correction=0)
    return out, mean, var


def depthwise_moments_gradient(
    gradient: Tensor,
    x: Tensor,
    y: Tensor,
    mean: Tensor,
    grad_mean: Tensor,
    grad_var: Tensor,
    kernel: int,
    stride: int,
    *,
    own: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = _wide(own)
    count = y.numel() // y.shape[1]
    slope = grad_var.to(wide) * (2 / count)
    shift = grad_mean.to(wide) / count - slope * mean.to(wide)
    grad_y = _contiguous(gradient, wide) + (_contiguous(y, wide) * _channels(slope) + _channels(shift))
    return _map(grad_y, y.dtype, own), *_weight_gradient(grad_y, x, kernel, stride, own)


def update_running_stats(
    running_mean: Tensor,
    running_var: Tensor,
    batches: Tensor,
    drift: Tensor,
    var: Tensor,
    momentum: float,
    correction: float,
    *,
    own: Tensor | None = None,
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
    own: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    wide = _wide(own)
    matrix = weight.flatten(1).to(wide)
    product = matrix * (gain.to(wide) * (var.to(wide) + eps).rsqrt())
    folded = product.to(dtype) if own is None else own.flatten(1)
    total = bias.to(wide) + (matrix * shift.to(wide) - folded.to(wide) * mean.to(wide)).sum(1)
    if own is None:
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
    own: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = _wide(own)
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
    if own is not None:
        return results
    likes = (weight, gain, shift, mean, var)
    return tuple(torch.empty_like(a).copy_(b) for a, b in zip(likes, results, strict=True))  # type: ignore[return-value]


# BatchNorm and ReLU behind a dense convolution


def channel_moments(x: Tensor, *, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(x.to(_wide(own)), dim=(0, 2, 3), correction=0)
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
    wide = _wide(own)
    scale = weight.to(wide) * (var.to(wide) + eps).rsqrt()
    found = (x.to(wide) - _channels(mean.to(wide))) * _channels(scale) + _channels(bias.to(wide))
    return _map(found.clamp_min(0), x.dtype, own)


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
    grad_out, normal, _ = _norm_relu_parts(gradient, x, result, mean, var, eps, _wide(own))
    return _numbers(torch.stack([grad_out.sum(dim=(0, 2, 3)), (grad_out * normal).sum(dim=(0, 2, 3))]), own)


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
    wide = _wide(own)
    grad_out, normal, rstd = _norm_relu_parts(gradient, x, result, mean, var, eps, wide)
    found = grad_out - _channels(grad_bias.to(wide) / count) - normal * _channels(grad_weight.to(wide) / count)
    return _map(found * _channels(weight.to(wide) * rstd), x.dtype, own)


def _norm_relu_parts(
    gradient: Tensor, x: Tensor, result: Tensor, mean: Tensor, var: Tensor, eps: float, wide: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient that ReLU lets through, the normalised x, and the reciprocal standard deviation."""
    rstd = (var.to(wide) + eps).rsqrt()
    normal = (x.to(wide) - _channels(mean.to(wide))) * _channels(rstd)
    return gradient.to(wide).masked_fill(result <= 0, 0.0), normal, rstd


# 1x1 convolution


def channel_sums(x: Tensor, dtype: torch.dtype, *, own: Tensor | None = None) -> Tensor:
    found = x.sum(dim=(0, 2, 3), dtype=_wide(own))
    return found.to(dtype) if own is None else found


# What they share


def _wide(own: Tensor | None) -> torch.dtype:
    """The dtype of all sums."""
    return torch.float32 if own is None else torch.float64


def _map(result: Tensor, dtype: torch.dtype, own: Tensor | None) -> Tensor:
    return channels_last(result.to(dtype)) if own is None else result


def _numbers(result: Tensor, own: Tensor | None) -> Tensor:
    """Statistics, and gradients of weights."""
    return result.to(torch.float32) if own is None else result


def _contiguous(x: Tensor, wide: torch.dtype) -> Tensor:
    """In NCHW memory, for which torch has depthwise kernels of its own on every device, without TF32."""
    return x.to(wide).contiguous()


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, residual: bool, wide: torch.dtype) -> Tensor:
    x, padding = _contiguous(x, wide), weight.shape[-1] // 2
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


def _weight_gradient(
    grad_out: Tensor, x: Tensor, kernel: int, stride: int, own: Tensor | None
) -> tuple[Tensor, Tensor]:
    weight = grad_out.new_zeros(x.shape[1], 1, kernel, kernel)
    _, grad_weight, grad_bias = _backward(
        grad_out, _contiguous(x, grad_out.dtype), weight, stride, needed=(False, True)
    )
    return _numbers(grad_weight, own).contiguous(), _numbers(grad_bias, own)


def _gate(local: Tensor, other: Tensor) -> Tensor:
    return aten.silu(local) * aten.silu(other)


def _gate_gradient(gradient: Tensor, local: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    grad_local = aten.silu_backward(gradient * aten.silu(other), local)
    return grad_local, aten.silu_backward(gradient * aten.silu(local), other)


def _heads(q: Tensor, kv: Tensor, heads: int, wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, heads, positions, channels of a head]."""
    key, value = kv.to(wide).chunk(2, dim=1)
    return _split(q.to(wide), heads), _split(key, heads), _split(value, heads)


def _split(x: Tensor, heads: int) -> Tensor:
    return x.flatten(2).unflatten(1, (heads, -1)).mT


def _joined(x: Tensor, like: Tensor) -> Tensor:
    """Heads as a map of the positions of `like`."""
    return x.mT.flatten(1, 2).unflatten(2, like.shape[2:])


def _times(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x * scale.to(x.dtype).view(-1, 1, 1, 1)


def _channels(x: Tensor) -> Tensor:
    return x.view(-1, 1, 1)


def _normalise(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, own: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    wide = _wide(own)
    value = x.to(wide)
    var, mean = torch.var_mean(value, dim=(1, 2, 3), correction=0)
    rstd = (var + eps).rsqrt()
    normal = _times(value - mean.view(-1, 1, 1, 1), rstd)
    out = normal * _channels(weight.to(wide)) + _channels(bias.to(wide))
    return _map(out, x.dtype, own), mean, rstd


def _norm_gradient(
    gradient: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    wide: torch.dtype,
) -> tuple[Tensor, Tensor]:
    grad_out = gradient.to(wide)
    normal = _times(x.to(wide) - mean.to(wide).view(-1, 1, 1, 1), rstd)
    grad = grad_out * _channels(weight.to(wide))
    means = [t.mean(dim=(1, 2, 3), keepdim=True) for t in (grad, grad * normal)]
    grad_x = _times(grad - means[0] - normal * means[1], rstd)
    if residual is not None:
        grad_x = grad_x + residual.to(wide)
    return grad_x, torch.stack([(grad_out * normal).sum(dim=(0, 2, 3)), grad_out.sum(dim=(0, 2, 3))])

"""The kernels as torch operators `fat::*`: shapes for tracing, gradients for autograd.

Maps are [B, C, H, W] in channels-last memory, float32, bfloat16 or float16; weights any float dtype. Every sum is in
fp32 and every result is rounded once, to the dtype of the map it belongs to; gradients of weights are summed in fp32
and returned in the weight's dtype. An operator that is called with another layout or device raises ValueError;
`fat.kernels` asks first. Triton is imported by the first call. There is no second derivative.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.library import custom_op

Function = TypeVar("Function", bound=Callable[..., Any])

SIZES = (3, 5, 7, 9)
STRIDES = (1, 2)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _on_its_device(function: Function) -> Function:
    """Triton launches on the current device, torch's operators on their tensors'."""

    @functools.wraps(function)
    def run(first: Tensor, *rest: Any, **options: Any) -> Any:
        if first.is_cuda and first.device.index != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                return function(first, *rest, **options)
        return function(first, *rest, **options)

    return run  # type: ignore[return-value]


# Depthwise convolution


@custom_op("fat::depthwise", mutates_args=())
@_on_its_device
def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, residual: bool) -> Tensor:
    """Depthwise k x k, padding k // 2; plus x where residual (stride 1). [B, C, ceil(H / stride), ceil(W / stride)]."""
    from fat.kernels.convolution import convolve

    _expect(x)
    _expect_weight(weight, x, stride, residual)
    out = _depthwise_shape(x, weight, bias, stride, residual)
    convolve(x, weight, bias, out, stride=stride, residual=residual)
    return out


@depthwise.register_fake
def _depthwise_shape(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, residual: bool) -> Tensor:
    return _map(x, x.shape[0], x.shape[1], -(-x.shape[2] // stride), -(-x.shape[3] // stride))


@custom_op("fat::depthwise_input_gradient", mutates_args=())
@_on_its_device
def depthwise_input_gradient(
    gradient: Tensor, weight: Tensor, height: int, width: int, stride: int, residual: bool
) -> Tensor:
    """The gradient by x of `depthwise`: [B, C, height, width]."""
    from fat.kernels.convolution import input_gradient

    _expect(gradient)
    _expect_weight(weight, gradient, stride, residual)
    out = _input_gradient_shape(gradient, weight, height, width, stride, residual)
    input_gradient(gradient, weight, out, stride=stride, residual=residual)
    return out


@depthwise_input_gradient.register_fake
def _input_gradient_shape(
    gradient: Tensor, weight: Tensor, height: int, width: int, stride: int, residual: bool
) -> Tensor:
    return _map(gradient, gradient.shape[0], gradient.shape[1], height, width)


@custom_op("fat::depthwise_weight_gradient", mutates_args=())
@_on_its_device
def depthwise_weight_gradient(gradient: Tensor, x: Tensor, kernel: int, stride: int) -> tuple[Tensor, Tensor]:
    """The gradients by weight, fp32 [C, 1, kernel, kernel], and by bias, fp32 [C]. Deterministic."""
    from fat.kernels.correlation import weight_gradient

    _expect(gradient, x)
    return weight_gradient(gradient, x, kernel=kernel, stride=stride)


@depthwise_weight_gradient.register_fake
def _weight_gradient_shape(gradient: Tensor, x: Tensor, kernel: int, stride: int) -> tuple[Tensor, Tensor]:
    channels = x.shape[1]
    return (
        x.new_empty(channels, 1, kernel, kernel, dtype=torch.float32),
        x.new_empty(channels, dtype=torch.float32),
    )


def _keep_depthwise(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, bias, ctx.stride, ctx.residual = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight)


def _depthwise_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    by_x, by_weight, by_bias = _convolution_gradients(
        gradient, x, weight, ctx.bias_dtype, ctx.needs_input_grad[:3], ctx.stride, ctx.residual
    )
    return by_x, by_weight, by_bias, None, None


depthwise.register_autograd(_depthwise_backward, setup_context=_keep_depthwise)


# Depthwise convolution and FASA's gate: SiLU(depthwise(q)) * SiLU(other)


@custom_op("fat::depthwise_gate", mutates_args=())
@_on_its_device
def depthwise_gate(q: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor) -> Tensor:
    """Stride 1; q and other of one shape and dtype."""
    from fat.kernels.convolution import GATE, convolve

    _expect(q, other)
    _expect_weight(weight, q, 1, False)
    out = torch.empty_like(q)
    convolve(q, weight, bias, out, epilogue=GATE, gate=other)
    return out


@depthwise_gate.register_fake
def _(q: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor) -> Tensor:
    return torch.empty_like(q)


@custom_op("fat::depthwise_gate_gradient", mutates_args=())
@_on_its_device
def depthwise_gate_gradient(
    gradient: Tensor, q: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients by depthwise(q), which is worked out again, and by other."""
    from fat.kernels.convolution import GATE_GRADIENT, convolve

    _expect(gradient, q, other)
    _expect_weight(weight, q, 1, False)
    by_local, by_other = torch.empty_like(q), torch.empty_like(other)
    convolve(q, weight, bias, by_local, epilogue=GATE_GRADIENT, gate=other, gradient=gradient, gate_out=by_other)
    return by_local, by_other


@depthwise_gate_gradient.register_fake
def _(gradient: Tensor, q: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(other)


def _keep_depthwise_gate(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _depthwise_gate_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    q, weight, bias, other = ctx.saved_tensors
    by_local, by_other = depthwise_gate_gradient(_channels_last(gradient), q, weight, bias, other)
    bias_dtype = None if bias is None else bias.dtype
    by_q, by_weight, by_bias = _convolution_gradients(
        by_local, q, weight, bias_dtype, ctx.needs_input_grad[:3], 1, False
    )
    return by_q, by_weight, by_bias, by_other


depthwise_gate.register_autograd(_depthwise_gate_backward, setup_context=_keep_depthwise_gate)


# FASA's gate alone


@custom_op("fat::gate", mutates_args=())
@_on_its_device
def gate(local: Tensor, other: Tensor) -> Tensor:
    """SiLU(local) * SiLU(other), of one shape and dtype."""
    from fat.kernels import gating as kernels

    _expect(local, other)
    out = torch.empty_like(local)
    kernels.gate(local, other, out)
    return out


@gate.register_fake
def _(local: Tensor, other: Tensor) -> Tensor:
    return torch.empty_like(local)


@custom_op("fat::gate_gradient", mutates_args=())
@_on_its_device
def gate_gradient(gradient: Tensor, local: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    from fat.kernels import gating as kernels

    _expect(gradient, local, other)
    by_local, by_other = torch.empty_like(local), torch.empty_like(other)
    kernels.gate_gradient(gradient, local, other, by_local, by_other)
    return by_local, by_other


@gate_gradient.register_fake
def _(gradient: Tensor, local: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(local), torch.empty_like(other)


def _keep_gate(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _gate_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
    return gate_gradient(_channels_last(gradient), *ctx.saved_tensors)


gate.register_autograd(_gate_backward, setup_context=_keep_gate)


# GroupNorm with one group; the residual add or the convolution before it


@custom_op("fat::norm", mutates_args=())
@_on_its_device
def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(normalised x, mean fp32 [B], reciprocal standard deviation fp32 [B])."""
    from fat.kernels import groupnorm as kernels

    _expect(x)
    moments = kernels.add(x, None, None, x, moments=True)
    assert moments is not None
    out = torch.empty_like(x)
    return out, *kernels.normalise(x, moments, weight, bias, out, eps)


@norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), *_statistics(x)


@custom_op("fat::add", mutates_args=())
@_on_its_device
def add(x: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
    """x + scale * branch in x's dtype; scale: fp32 [B] or none."""
    from fat.kernels import groupnorm as kernels

    _expect(x)
    _expect(branch)
    out = torch.empty_like(x)
    kernels.add(x, branch, scale, out, moments=False)
    return out


@add.register_fake
def _(x: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
    return torch.empty_like(x)


@custom_op("fat::scaled", mutates_args=())
@_on_its_device
def scaled(x: Tensor, scale: Tensor) -> Tensor:
    """scale * x in x's dtype; scale: fp32 [B]."""
    from fat.kernels import groupnorm as kernels

    _expect(x)
    out = torch.empty_like(x)
    kernels.add(None, x, scale, out, moments=False)
    return out


@scaled.register_fake
def _(x: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(x)


@custom_op("fat::add_norm", mutates_args=())
@_on_its_device
def add_norm(
    x: Tensor, branch: Tensor, scale: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`add`, and `norm` of it: (sum, normalised sum, mean, reciprocal standard deviation)."""
    from fat.kernels import groupnorm as kernels

    _expect(x)
    _expect(branch)
    total, out = torch.empty_like(x), torch.empty_like(x)
    moments = kernels.add(x, branch, scale, total, moments=True)
    assert moments is not None
    return total, out, *kernels.normalise(total, moments, weight, bias, out, eps)


@add_norm.register_fake
def _(
    x: Tensor, branch: Tensor, scale: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x), *_statistics(x)


@custom_op("fat::depthwise_norm", mutates_args=())
@_on_its_device
def depthwise_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`depthwise` with residual, and `norm` of it: (map, normalised map, mean, reciprocal standard deviation)."""
    from fat.kernels import groupnorm as kernels
    from fat.kernels.convolution import convolve

    _expect(x)
    _expect_weight(weight, x, 1, True)
    total, out = torch.empty_like(x), torch.empty_like(x)
    moments = convolve(x, weight, bias, total, residual=True, moments=True)
    assert moments is not None
    return total, out, *kernels.normalise(total, moments, norm_weight, norm_bias, out, eps)


@depthwise_norm.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x), *_statistics(x)


@custom_op("fat::norm_gradient", mutates_args=())
@_on_its_device
def norm_gradient(
    gradient: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradients of `norm` by x, to which residual is added, and by weight and bias, fp32 [2, C]. Deterministic."""
    from fat.kernels import groupnorm as kernels

    _expect(gradient, x, *(() if residual is None else (residual,)))
    out = torch.empty_like(x)
    return out, kernels.gradients(gradient, x, mean, rstd, weight, residual, None, out, None)


@norm_gradient.register_fake
def _(
    gradient: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), _affine(weight)


@custom_op("fat::add_norm_gradient", mutates_args=())
@_on_its_device
def add_norm_gradient(
    gradient: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    residual: Tensor,
    scale: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `norm_gradient`, with scale times the first result, in the branch's dtype, as the second."""
    from fat.kernels import groupnorm as kernels

    _expect(gradient, x, residual)
    out, branch_out = torch.empty_like(x), torch.empty_like(x, dtype=dtype)
    return out, branch_out, kernels.gradients(gradient, x, mean, rstd, weight, residual, scale, out, branch_out)


@add_norm_gradient.register_fake
def _(
    gradient: Tensor,
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
    ctx.save_for_backward(x, mean, rstd, weight)


def _norm_backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, mean, rstd, weight = ctx.saved_tensors
    by_x, affine = norm_gradient(_channels_last(gradient), x, mean, rstd, weight, None)
    return by_x, affine[0].to(weight.dtype), affine[1].to(ctx.bias_dtype), None


norm.register_autograd(_norm_backward, setup_context=_keep_norm)


def _keep_add(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, branch, scale = inputs
    ctx.branch_dtype = branch.dtype
    ctx.save_for_backward(scale)


def _add_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    (scale,) = ctx.saved_tensors
    gradient = _channels_last(gradient)
    by_branch = gradient if scale is None else scaled(gradient, scale)
    return gradient, by_branch.to(ctx.branch_dtype), None


add.register_autograd(_add_backward, setup_context=_keep_add)


def _keep_add_norm(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, branch, scale, weight, bias, _ = inputs
    total, _, mean, rstd = output
    ctx.branch_dtype, ctx.bias_dtype = branch.dtype, bias.dtype
    ctx.save_for_backward(total, mean, rstd, weight, scale)


def _add_norm_backward(ctx: Any, residual: Tensor, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    total, mean, rstd, weight, scale = ctx.saved_tensors
    gradient, residual = _channels_last(gradient), _channels_last(residual)
    if scale is None and ctx.branch_dtype == total.dtype:
        by_x, affine = norm_gradient(gradient, total, mean, rstd, weight, residual)
        by_branch = by_x
    else:
        by_x, by_branch, affine = add_norm_gradient(
            gradient, total, mean, rstd, weight, residual, scale, ctx.branch_dtype
        )
    return by_x, by_branch, None, affine[0].to(weight.dtype), affine[1].to(ctx.bias_dtype), None


add_norm.register_autograd(_add_norm_backward, setup_context=_keep_add_norm)


def _keep_depthwise_norm(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, bias, norm_weight, norm_bias, _ = inputs
    total, _, mean, rstd = output
    ctx.bias_dtype, ctx.norm_bias_dtype = None if bias is None else bias.dtype, norm_bias.dtype
    ctx.save_for_backward(x, weight, total, mean, rstd, norm_weight)


def _depthwise_norm_backward(ctx: Any, residual: Tensor, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, total, mean, rstd, norm_weight = ctx.saved_tensors
    by_total, affine = norm_gradient(_channels_last(gradient), total, mean, rstd, norm_weight, _channels_last(residual))
    by_x, by_weight, by_bias = _convolution_gradients(
        by_total, x, weight, ctx.bias_dtype, ctx.needs_input_grad[:3], 1, True
    )
    by_norm_weight, by_norm_bias = affine[0].to(norm_weight.dtype), affine[1].to(ctx.norm_bias_dtype)
    return by_x, by_weight, by_bias, by_norm_weight, by_norm_bias, None


depthwise_norm.register_autograd(_depthwise_norm_backward, setup_context=_keep_depthwise_norm)


def _convolution_gradients(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_dtype: torch.dtype | None,
    needed: tuple[bool, bool, bool],
    stride: int,
    residual: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """By x, weight and bias, as far as needed."""
    gradient = _channels_last(gradient)
    by_x = by_weight = by_bias = None
    if needed[0]:
        by_x = depthwise_input_gradient(gradient, weight, x.shape[2], x.shape[3], stride, residual)
    if needed[1] or needed[2]:
        by_weight, by_bias = depthwise_weight_gradient(gradient, x, weight.shape[-1], stride)
        by_weight = by_weight.to(weight.dtype)
        by_bias = None if bias_dtype is None else by_bias.to(bias_dtype)
    return by_x, by_weight, by_bias


def _map(like: Tensor, batch: int, channels: int, height: int, width: int) -> Tensor:
    return torch.empty(
        (batch, channels, height, width), dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], dtype=torch.float32), x.new_empty(x.shape[0], dtype=torch.float32)


def _affine(weight: Tensor) -> Tensor:
    return weight.new_empty(2, weight.shape[0], dtype=torch.float32)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _expect(first: Tensor, *others: Tensor) -> None:
    """Raises ValueError unless all are alike and as the kernels read them."""
    for x in (first, *others):
        if x.ndim != 4 or not x.is_contiguous(memory_format=torch.channels_last):
            raise ValueError(
                f"a map of shape {tuple(x.shape)} and strides {x.stride()}: fat::* kernels expect [B, C, H, W] in "
                "channels-last memory; use .contiguous(memory_format=torch.channels_last)"
            )
        if x.dtype not in DTYPES:
            raise ValueError(f"a map in {x.dtype}: fat::* kernels expect one of {', '.join(map(str, DTYPES))}")
        if (x.device, x.dtype) != (first.device, first.dtype):
            raise ValueError(
                f"maps on {first.device} in {first.dtype} and on {x.device} in {x.dtype}: expected one device and dtype"
            )


def _expect_weight(weight: Tensor, x: Tensor, stride: int, residual: bool) -> None:
    kernel = weight.shape[-1]
    if weight.shape != (x.shape[1], 1, kernel, kernel) or kernel not in SIZES:
        raise ValueError(
            f"depthwise weights of shape {tuple(weight.shape)} for {x.shape[1]} channels: expected "
            f"[{x.shape[1]}, 1, k, k] with k one of {', '.join(map(str, SIZES))}"
        )
    if stride not in STRIDES or (residual and stride != 1):
        raise ValueError(f"stride {stride}, residual {residual}: expected stride 1, or stride 2 without residual")
    if weight.device != x.device:
        raise ValueError(f"depthwise weights on {weight.device} and a map on {x.device}: expected one device")

"""Operator `fat::channel_sums`, and the 1x1 convolution whose bias gradient it computes. See `fat.kernels.ops`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from fat.kernels.families import BIAS_GRADIENT, launches
from fat.kernels.ops.checks import channels_last, check_feature_maps


@custom_op("fat::channel_sums", mutates_args=())
@launches(BIAS_GRADIENT)
def channel_sums(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum of each channel over batch and positions, [C] in dtype. Deterministic."""
    from fat.kernels.impl import channel_sums as kernels

    check_feature_maps(x)
    out = x.new_empty(x.shape[1], dtype=dtype)
    kernels.channel_sums(x, out)
    return out


@channel_sums.register_fake
def _(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape[1], dtype=dtype)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute a 1x1 convolution as a matrix product in x's dtype.

    weight: [O, C, 1, 1]; bias: [O]; both in any floating-point dtype.
    """
    result: Tensor = _Pointwise.apply(x, weight, bias)
    return result


class _Pointwise(torch.autograd.Function):
    """An autograd function, not a custom operator, so that compilers and FLOP counters see the matrix products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.weight_dtype, ctx.bias_dtype = weight.dtype, bias.dtype
        weight = weight.to(x.dtype)
        ctx.save_for_backward(x, weight)
        # Not F.linear: DeepSpeed's ZeRO 3 replaces it by a version that keeps the gathered weights in memory.
        return as_map(torch.addmm(bias.to(x.dtype), as_rows(x), weight.flatten(1).t()), x)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_out = channels_last(grad_out)
        rows = as_rows(grad_out)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = as_map(rows @ weight.flatten(1), x)
        if ctx.needs_input_grad[1]:
            grad_weight = (rows.t() @ as_rows(x)).view(weight.shape).to(ctx.weight_dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = channel_sums(grad_out, ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias


def as_rows(x: Tensor) -> Tensor:
    """Reshape [B, C, H, W] to [B H W, C]; a view if x is channels-last."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def as_map(rows: Tensor, like: Tensor) -> Tensor:
    """View [B H W, C] as [B, C, H, W] in channels-last memory, with the batch size and resolution of `like`."""
    batch, _, height, width = like.shape
    return rows.view(batch, height, width, -1).permute(0, 3, 1, 2)

"""Operators `fat::attend*`: FASA's attention to the keys of a pooled feature map. See `fat.kernels.ops`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from fat.kernels.families import ATTENTION, launches
from fat.kernels.impl import tiles
from fat.kernels.ops.checks import channels_last, check_feature_maps


@custom_op("fat::attend", mutates_args=())
@launches(ATTENTION)
def attend(q: Tensor, kv: Tensor, heads: int, scale: float) -> Tensor:
    """Compute softmax(scale * q k^T) v for each head. q, result: [B, C, H, W]; kv: [B, 2 C, h, w], keys first."""
    from fat.kernels.impl import attention as kernels

    _check(q, kv, heads)
    out = torch.empty_like(q)
    kernels.attend(q, kv, heads, scale, out)
    return out


@attend.register_fake
def _(q: Tensor, kv: Tensor, heads: int, scale: float) -> Tensor:
    return torch.empty_like(q)


@custom_op("fat::attend_gradient", mutates_args=())
@launches(ATTENTION)
def attend_gradient(grad_out: Tensor, q: Tensor, kv: Tensor, heads: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return the gradients of q and kv."""
    from fat.kernels.impl import attention as kernels

    check_feature_maps(grad_out, q)
    _check(q, kv, heads)
    grad_q, grad_kv = torch.empty_like(q), torch.empty_like(kv)
    kernels.attend_gradient(grad_out, q, kv, heads, scale, grad_q, grad_kv)
    return grad_q, grad_kv


@attend_gradient.register_fake
def _(grad_out: Tensor, q: Tensor, kv: Tensor, heads: int, scale: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(kv)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, kv, ctx.heads, ctx.scale = inputs
    ctx.save_for_backward(q, kv)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    q, kv = ctx.saved_tensors
    return *attend_gradient(channels_last(grad_out), q, kv, ctx.heads, ctx.scale), None, None


attend.register_autograd(_backward, setup_context=_keep)


def _check(q: Tensor, kv: Tensor, heads: int) -> None:
    check_feature_maps(q, kv)
    channels, keys = q.shape[1], kv.shape[2] * kv.shape[3]
    if kv.shape[:2] != (q.shape[0], 2 * channels) or channels % heads:
        raise ValueError(
            f"q of shape {tuple(q.shape)} with {heads} heads and kv of shape {tuple(kv.shape)}: expected channels that "
            f"are divisible by the heads, and kv of shape [{q.shape[0]}, {2 * channels}, h, w]"
        )
    depth = channels // heads
    if not tiles.attention_fits(depth, keys):
        raise ValueError(
            f"{depth} channels per head and {keys} keys: expected at most {tiles.MAX_HEAD} and {tiles.MAX_KEYS}"
        )

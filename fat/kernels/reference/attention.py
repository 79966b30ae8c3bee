"""Reference implementation of attention to the keys of a pooled feature map."""

from __future__ import annotations

import torch
from torch import Tensor

from fat.kernels.reference.precision import as_map, sum_dtype


def attend(q: Tensor, kv: Tensor, heads: int, scale: float, *, kernel_out: Tensor | None = None) -> Tensor:
    wide = sum_dtype(kernel_out)
    query, key, value = _heads(q, kv, heads, wide)
    return as_map(_joined((query @ key.mT * scale).softmax(-1) @ value, q), q.dtype, kernel_out)


def attend_gradient(
    grad_out: Tensor, q: Tensor, kv: Tensor, heads: int, scale: float, *, kernel_out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    wide = sum_dtype(kernel_out)
    query, key, value = _heads(q, kv, heads, wide)
    grad_out = _split(grad_out.to(wide), heads)
    weights = (query @ key.mT * scale).softmax(-1)
    slopes = grad_out @ value.mT
    slopes = weights * (slopes - (weights * slopes).sum(-1, keepdim=True)) * scale
    grad_keys, grad_values = (_joined(product, kv) for product in (slopes.mT @ query, weights.mT @ grad_out))
    grad_q, grad_kv = _joined(slopes @ key, q), torch.cat([grad_keys, grad_values], 1)
    return as_map(grad_q, q.dtype, kernel_out), as_map(grad_kv, kv.dtype, kernel_out)


def _heads(q: Tensor, kv: Tensor, heads: int, wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values, each [B, heads, positions, channels per head], in dtype `wide`."""
    key, value = kv.to(wide).chunk(2, dim=1)
    return _split(q.to(wide), heads), _split(key, heads), _split(value, heads)


def _split(x: Tensor, heads: int) -> Tensor:
    return x.flatten(2).unflatten(1, (heads, -1)).mT


def _joined(x: Tensor, like: Tensor) -> Tensor:
    """Join the heads to a feature map with the resolution of `like`."""
    return x.mT.flatten(1, 2).unflatten(2, like.shape[2:])

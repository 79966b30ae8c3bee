"""Attention to the keys of a pooled map."""

from __future__ import annotations

import torch
from torch import Tensor

from fat.kernels.reference.precision import as_map, sum_dtype


def attend(q: Tensor, kv: Tensor, heads: int, scale: float, *, own: Tensor | None = None) -> Tensor:
    wide = sum_dtype(own)
    query, key, value = _heads(q, kv, heads, wide)
    return as_map(_joined((query @ key.mT * scale).softmax(-1) @ value, q), q.dtype, own)


def attend_gradient(
    gradient: Tensor, q: Tensor, kv: Tensor, heads: int, scale: float, *, own: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    wide = sum_dtype(own)
    query, key, value = _heads(q, kv, heads, wide)
    grad_out = _split(gradient.to(wide), heads)
    weights = (query @ key.mT * scale).softmax(-1)
    slopes = grad_out @ value.mT
    slopes = weights * (slopes - (weights * slopes).sum(-1, keepdim=True)) * scale
    grad_keys, grad_values = (_joined(product, kv) for product in (slopes.mT @ query, weights.mT @ grad_out))
    return as_map(_joined(slopes @ key, q), q.dtype, own), as_map(torch.cat([grad_keys, grad_values], 1), kv.dtype, own)


def _heads(q: Tensor, kv: Tensor, heads: int, wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, heads, positions, channels of a head]."""
    key, value = kv.to(wide).chunk(2, dim=1)
    return _split(q.to(wide), heads), _split(key, heads), _split(value, heads)


def _split(x: Tensor, heads: int) -> Tensor:
    return x.flatten(2).unflatten(1, (heads, -1)).mT


def _joined(x: Tensor, like: Tensor) -> Tensor:
    """Heads as a map of the positions of `like`."""
    return x.mT.flatten(1, 2).unflatten(2, like.shape[2:])

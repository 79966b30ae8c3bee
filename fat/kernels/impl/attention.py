"""Triton: FASA's attention of every position to the few keys of a pooled map, and its gradients.

All keys of a sample fit into one tile, so that a softmax is done at once, nothing but the maps is kept for the backward
pass, and each map is read and written once, as it lies in channels-last memory: no heads are split off or joined.

Products of two maps are exact in the matrix units, which add in fp32. Where a factor is the softmax or its gradient,
fp32 by itself, it is split into two numbers of the maps' dtype whose sum has twice the digits (in float16 as far as its
range goes, which is that of torch's attention).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fat.kernels.impl import tiles

_SIZES = ["queries", "keys", "row_tiles"]


@triton.jit
def _product(left, right, EXACT: tl.constexpr):
    """left @ right for fp32 left; right in the maps' dtype."""
    if EXACT:
        return tl.dot(left, right, input_precision="ieee")
    grad_out = left.to(right.dtype)
    lower = (left - grad_out.to(tl.float32)).to(right.dtype)
    return tl.dot(lower, right, tl.dot(grad_out, right))


@triton.jit
def _scores(left, right, EXACT: tl.constexpr):
    """left @ right, both in the maps' dtype."""
    if EXACT:
        return tl.dot(left, right, input_precision="ieee")
    return tl.dot(left, right)


@triton.jit
def _softmax(q, k_transposed, scale, mask, EXACT: tl.constexpr):
    """fp32 [rows, keys] of scale * q @ k^T over the known keys."""
    # log2(e), for exp2. Not a global constant: a kernel's key in Triton's cache would depend on whether another kernel
    # that calls this function was looked up before it.
    scores = _scores(q, k_transposed, EXACT) * (scale * 1.4426950408889634)
    scores = tl.where(mask[None, :], scores, float("-inf"))
    powers = tl.exp2(scores - tl.max(scores, axis=1)[:, None])
    return powers / tl.sum(powers, axis=1)[:, None]


@triton.jit(do_not_specialize=_SIZES)
def _attend(
    q,
    kv,
    out,
    scale,
    queries,
    keys,
    row_tiles,
    channels: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
    EXACT: tl.constexpr,
):
    """q [B, queries, channels], kv [B, keys, 2 channels] -> out as q. A program has ROWS queries of one head, whose
    channels are padded to WIDTH and whose keys to KEYS."""
    depth: tl.constexpr = channels // HEADS
    program = tl.program_id(0)
    head = program % HEADS
    rest = program // HEADS
    sample = (rest // row_tiles).to(tl.int64)
    row = (rest % row_tiles) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, WIDTH)
    key = tl.arange(0, KEYS)
    inside = (row < queries)[:, None] & (c < depth)[None, :]
    place = sample * queries * channels + head * depth + row[:, None] * channels + c[None, :]
    source = kv + sample * keys * 2 * channels + head * depth + key[:, None] * (2 * channels) + c[None, :]
    there = (key < keys)[:, None] & (c < depth)[None, :]
    k = tl.load(source, mask=there, other=0.0)
    v = tl.load(source + channels, mask=there, other=0.0)
    weights = _softmax(tl.load(q + place, mask=inside, other=0.0), tl.trans(k), scale, key < keys, EXACT)
    tl.store(out + place, _product(weights, v, EXACT).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def _attend_gradient(
    gradient,
    q,
    kv,
    q_out,
    kv_out,
    scale,
    queries,
    keys,
    row_tiles,
    channels: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
    EXACT: tl.constexpr,
):
    """The gradients by q and kv. A program has one head of one sample, walks over its queries and keeps the sums of its
    keys' and values' gradients: no atomics, so the same input gives the same bits."""
    depth: tl.constexpr = channels // HEADS
    program = tl.program_id(0)
    head = program % HEADS
    sample = (program // HEADS).to(tl.int64)
    c = tl.arange(0, WIDTH)
    key = tl.arange(0, KEYS)
    at = sample * keys * 2 * channels + head * depth + key[:, None] * (2 * channels) + c[None, :]
    there = (key < keys)[:, None] & (c < depth)[None, :]
    k = tl.load(kv + at, mask=there, other=0.0)
    v = tl.load(kv + at + channels, mask=there, other=0.0)
    k_transposed, v_transposed = tl.trans(k), tl.trans(v)
    grad_k = tl.zeros((KEYS, WIDTH), tl.float32)
    grad_v = tl.zeros((KEYS, WIDTH), tl.float32)
    base = sample * queries * channels + head * depth
    for tile in range(row_tiles):
        row = tile * ROWS + tl.arange(0, ROWS)
        inside = (row < queries)[:, None] & (c < depth)[None, :]
        place = base + row[:, None] * channels + c[None, :]
        query = tl.load(q + place, mask=inside, other=0.0)
        grad_out = tl.load(gradient + place, mask=inside, other=0.0)
        weights = _softmax(query, k_transposed, scale, key < keys, EXACT)
        slopes = _scores(grad_out, v_transposed, EXACT)
        slopes = weights * (slopes - tl.sum(weights * slopes, axis=1)[:, None])
        grad_query = _product(slopes, k, EXACT) * scale
        tl.store(q_out + place, grad_query.to(q_out.dtype.element_ty), mask=inside)
        grad_k += _product(tl.trans(slopes), query, EXACT)
        grad_v += _product(tl.trans(weights), grad_out, EXACT)
    tl.store(kv_out + at, (grad_k * scale).to(kv_out.dtype.element_ty), mask=there)
    tl.store(kv_out + at + channels, grad_v.to(kv_out.dtype.element_ty), mask=there)


def attend(q: Tensor, kv: Tensor, heads: int, scale: float, out: Tensor) -> None:
    """Fills `out`."""
    sizes, constants = _launch(q, kv, heads, tiles.ATTENTION_ROWS)
    _attend[(q.shape[0] * heads * sizes[2],)](
        q, kv, out, scale, *sizes, q.shape[1], HEADS=heads, **constants, num_warps=tiles.ATTENTION_WARPS
    )


def attend_gradient(
    gradient: Tensor, q: Tensor, kv: Tensor, heads: int, scale: float, q_out: Tensor, kv_out: Tensor
) -> None:
    """Fills `q_out` and `kv_out`."""
    sizes, constants = _launch(q, kv, heads, tiles.ATTENTION_GRADIENT_ROWS)
    _attend_gradient[(q.shape[0] * heads,)](
        gradient, q, kv, q_out, kv_out, scale, *sizes, q.shape[1], HEADS=heads, **constants,
        num_warps=tiles.ATTENTION_WARPS,
    )  # fmt: skip


def _launch(q: Tensor, kv: Tensor, heads: int, rows: int) -> tuple[tuple[int, int, int], dict[str, int | bool]]:
    """(queries, keys, tiles of rows) and the kernels' constants."""
    queries, keys = q.shape[2] * q.shape[3], kv.shape[2] * kv.shape[3]
    rows = min(rows, max(tiles.LEAST_PRODUCT, tiles.power_of_2(queries)))
    constants = {
        "WIDTH": max(tiles.LEAST_PRODUCT, tiles.power_of_2(q.shape[1] // heads)),
        "KEYS": max(tiles.LEAST_PRODUCT, tiles.power_of_2(keys)),
        "ROWS": rows,
        "EXACT": q.dtype == torch.float32,
    }
    return (queries, keys, triton.cdiv(queries, rows)), constants

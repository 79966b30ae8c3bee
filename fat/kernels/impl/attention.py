"""Triton kernels of FASA's attention from every position to the few keys of a pooled feature map, and its gradients.

All keys of a sample fit into one tile. So each softmax is computed in one step, only the inputs are saved for the
backward pass, and each feature map is read and written once. Heads are addressed in channels-last memory, without
copies that split or join them.

The matrix units multiply two half-precision factors exactly and add in fp32. A factor that is fp32, the softmax or its
gradient, is split into the sum of two half-precision numbers, which has twice the precision. In float16, values must
be within its range, as in PyTorch's attention.
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
    """Compute left @ right, where left is fp32 and right has the feature maps' dtype."""
    if EXACT:
        return tl.dot(left, right, input_precision="ieee")
    high = left.to(right.dtype)
    low = (left - high.to(tl.float32)).to(right.dtype)
    return tl.dot(low, right, tl.dot(high, right))


@triton.jit
def _scores(left, right, EXACT: tl.constexpr):
    """Compute left @ right, both in the feature maps' dtype."""
    if EXACT:
        return tl.dot(left, right, input_precision="ieee")
    return tl.dot(left, right)


@triton.jit
def _softmax(q, k_transposed, scale, mask, EXACT: tl.constexpr):
    """Compute softmax(scale * q @ k^T) over the keys in the mask, fp32 [rows, keys]."""
    # The factor is log2(e), for exp2. It is not a global constant, because then a kernel's key in Triton's cache would
    # depend on whether another kernel that calls this function was looked up before.
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
    """q [B, queries, channels], kv [B, keys, 2 channels] -> out, with q's shape. A program computes ROWS queries of one
    head, whose channels are padded to WIDTH and whose keys are padded to KEYS."""
    depth: tl.constexpr = channels // HEADS
    program = tl.program_id(0)
    head = program % HEADS
    rest = program // HEADS
    sample = (rest // row_tiles).to(tl.int64)
    row = (rest % row_tiles) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, WIDTH)
    key = tl.arange(0, KEYS)
    q_mask = (row < queries)[:, None] & (c < depth)[None, :]
    q_offset = sample * queries * channels + head * depth + row[:, None] * channels + c[None, :]
    source = kv + sample * keys * 2 * channels + head * depth + key[:, None] * (2 * channels) + c[None, :]
    kv_mask = (key < keys)[:, None] & (c < depth)[None, :]
    k = tl.load(source, mask=kv_mask, other=0.0)
    v = tl.load(source + channels, mask=kv_mask, other=0.0)
    weights = _softmax(tl.load(q + q_offset, mask=q_mask, other=0.0), tl.trans(k), scale, key < keys, EXACT)
    tl.store(out + q_offset, _product(weights, v, EXACT).to(out.dtype.element_ty), mask=q_mask)


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
    """Compute the gradients of q and kv. A program computes one head of one sample: it iterates over the queries and
    accumulates the gradients of keys and values. There are no atomic additions, so the result is deterministic."""
    depth: tl.constexpr = channels // HEADS
    program = tl.program_id(0)
    head = program % HEADS
    sample = (program // HEADS).to(tl.int64)
    c = tl.arange(0, WIDTH)
    key = tl.arange(0, KEYS)
    kv_offset = sample * keys * 2 * channels + head * depth + key[:, None] * (2 * channels) + c[None, :]
    kv_mask = (key < keys)[:, None] & (c < depth)[None, :]
    k = tl.load(kv + kv_offset, mask=kv_mask, other=0.0)
    v = tl.load(kv + kv_offset + channels, mask=kv_mask, other=0.0)
    k_transposed, v_transposed = tl.trans(k), tl.trans(v)
    grad_k = tl.zeros((KEYS, WIDTH), tl.float32)
    grad_v = tl.zeros((KEYS, WIDTH), tl.float32)
    base = sample * queries * channels + head * depth
    for tile in range(row_tiles):
        row = tile * ROWS + tl.arange(0, ROWS)
        q_mask = (row < queries)[:, None] & (c < depth)[None, :]
        q_offset = base + row[:, None] * channels + c[None, :]
        query = tl.load(q + q_offset, mask=q_mask, other=0.0)
        grad_out = tl.load(gradient + q_offset, mask=q_mask, other=0.0)
        weights = _softmax(query, k_transposed, scale, key < keys, EXACT)
        grad_scores = _scores(grad_out, v_transposed, EXACT)
        grad_scores = weights * (grad_scores - tl.sum(weights * grad_scores, axis=1)[:, None])
        grad_query = _product(grad_scores, k, EXACT) * scale
        tl.store(q_out + q_offset, grad_query.to(q_out.dtype.element_ty), mask=q_mask)
        grad_k += _product(tl.trans(grad_scores), query, EXACT)
        grad_v += _product(tl.trans(weights), grad_out, EXACT)
    tl.store(kv_out + kv_offset, (grad_k * scale).to(kv_out.dtype.element_ty), mask=kv_mask)
    tl.store(kv_out + kv_offset + channels, grad_v.to(kv_out.dtype.element_ty), mask=kv_mask)


def attend(q: Tensor, kv: Tensor, heads: int, scale: float, out: Tensor) -> None:
    """Compute attention into `out`."""
    sizes, constants = _launch(q, kv, heads, tiles.ATTENTION_ROWS)
    _attend[(q.shape[0] * heads * sizes[2],)](
        q, kv, out, scale, *sizes, q.shape[1], HEADS=heads, **constants, num_warps=tiles.ATTENTION_WARPS
    )


def attend_gradient(
    grad_out: Tensor, q: Tensor, kv: Tensor, heads: int, scale: float, q_out: Tensor, kv_out: Tensor
) -> None:
    """Compute the gradients of q and kv into `q_out` and `kv_out`."""
    sizes, constants = _launch(q, kv, heads, tiles.ATTENTION_GRADIENT_ROWS)
    _attend_gradient[(q.shape[0] * heads,)](
        grad_out, q, kv, q_out, kv_out, scale, *sizes, q.shape[1], HEADS=heads, **constants,
        num_warps=tiles.ATTENTION_WARPS,
    )  # fmt: skip


def _launch(q: Tensor, kv: Tensor, heads: int, rows: int) -> tuple[tuple[int, int, int], dict[str, int | bool]]:
    """Return (queries, keys, row tiles) and the kernels' constexpr arguments."""
    queries, keys = q.shape[2] * q.shape[3], kv.shape[2] * kv.shape[3]
    rows = min(rows, max(tiles.MIN_DOT_SIZE, tiles.power_of_2(queries)))
    constants = {
        "WIDTH": max(tiles.MIN_DOT_SIZE, tiles.power_of_2(q.shape[1] // heads)),
        "KEYS": max(tiles.MIN_DOT_SIZE, tiles.power_of_2(keys)),
        "ROWS": rows,
        "EXACT": q.dtype == torch.float32,
    }
    return (queries, keys, triton.cdiv(queries, rows)), constants

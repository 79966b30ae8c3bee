"""Triton kernels of FASA's gate SiLU(local) * SiLU(other) and its gradients, if another operator computed `local`.

Only the two inputs are saved: the backward pass recomputes the sigmoids, which is faster than reading them. Tensors
have the same shape, dtype and memory format, and are processed as flat arrays.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fat.kernels.impl import tiles


@triton.jit
def _gate(local, other, out, numel, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(local + at, mask=at < numel, other=0.0).to(tl.float32)
    b = tl.load(other + at, mask=at < numel, other=0.0).to(tl.float32)
    value = (a * tl.sigmoid(a)) * (b * tl.sigmoid(b))
    tl.store(out + at, value.to(out.dtype.element_ty), mask=at < numel)


@triton.jit
def _gate_gradient(gradient, local, other, local_out, other_out, numel, BLOCK: tl.constexpr):
    """Gradients of local and other, by d SiLU(a) / da = sigmoid(a) (1 + a - SiLU(a))."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    grad_out = tl.load(gradient + at, mask=at < numel, other=0.0).to(tl.float32)
    a = tl.load(local + at, mask=at < numel, other=0.0).to(tl.float32)
    b = tl.load(other + at, mask=at < numel, other=0.0).to(tl.float32)
    a_sigmoid, b_sigmoid = tl.sigmoid(a), tl.sigmoid(b)
    a_silu, b_silu = a * a_sigmoid, b * b_sigmoid
    grad_a = grad_out * b_silu * (a_sigmoid * (1 + a - a_silu))
    grad_b = grad_out * a_silu * (b_sigmoid * (1 + b - b_silu))
    tl.store(local_out + at, grad_a.to(local_out.dtype.element_ty), mask=at < numel)
    tl.store(other_out + at, grad_b.to(other_out.dtype.element_ty), mask=at < numel)


def gate(local: Tensor, other: Tensor, out: Tensor) -> None:
    """Compute the gate into `out`."""
    numel = out.numel()
    _gate[(triton.cdiv(numel, tiles.FLAT),)](local, other, out, numel, BLOCK=tiles.FLAT, num_warps=tiles.FLAT_WARPS)


def gate_gradient(grad_out: Tensor, local: Tensor, other: Tensor, local_out: Tensor, other_out: Tensor) -> None:
    """Compute the gradients of local and other into `local_out` and `other_out`."""
    numel = grad_out.numel()
    _gate_gradient[(triton.cdiv(numel, tiles.FLAT),)](
        grad_out, local, other, local_out, other_out, numel, BLOCK=tiles.FLAT, num_warps=tiles.FLAT_WARPS
    )

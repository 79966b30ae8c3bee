"""The product of two maps, each behind SiLU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fat.kernels.reference.precision import as_map, sum_dtype

aten: Any = torch.ops.aten


def gate(local: Tensor, other: Tensor, *, own: Tensor | None = None) -> Tensor:
    wide = sum_dtype(own)
    return as_map(multiply_silus(local.to(wide), other.to(wide)), local.dtype, own)


def gate_gradient(
    gradient: Tensor, local: Tensor, other: Tensor, *, own: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    wide = sum_dtype(own)
    grad_local, grad_other = multiply_silus_gradient(gradient.to(wide), local.to(wide), other.to(wide))
    return as_map(grad_local, local.dtype, own), as_map(grad_other, other.dtype, own)


def multiply_silus(local: Tensor, other: Tensor) -> Tensor:
    return aten.silu(local) * aten.silu(other)


def multiply_silus_gradient(gradient: Tensor, local: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    grad_local = aten.silu_backward(gradient * aten.silu(other), local)
    return grad_local, aten.silu_backward(gradient * aten.silu(local), other)

"""Reference implementation of FASA's gate, the product of two feature maps after SiLU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fat.kernels.reference.precision import as_map, sum_dtype

aten: Any = torch.ops.aten


def gate(local: Tensor, other: Tensor, *, kernel_out: Tensor | None = None) -> Tensor:
    wide = sum_dtype(kernel_out)
    return as_map(multiply_silus(local.to(wide), other.to(wide)), local.dtype, kernel_out)


def gate_gradient(
    grad_out: Tensor, local: Tensor, other: Tensor, *, kernel_out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    wide = sum_dtype(kernel_out)
    grad_local, grad_other = multiply_silus_gradient(grad_out.to(wide), local.to(wide), other.to(wide))
    return as_map(grad_local, local.dtype, kernel_out), as_map(grad_other, other.dtype, kernel_out)


def multiply_silus(local: Tensor, other: Tensor) -> Tensor:
    return aten.silu(local) * aten.silu(other)


def multiply_silus_gradient(grad_out: Tensor, local: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    grad_local = aten.silu_backward(grad_out * aten.silu(other), local)
    return grad_local, aten.silu_backward(grad_out * aten.silu(local), other)

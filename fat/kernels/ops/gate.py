"""Operators `fat::gate*`: FASA's gate, if the local branch was computed by another operator. See `fat.kernels.ops`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from fat.kernels.families import GATE, launches
from fat.kernels.ops.checks import channels_last, check_feature_maps


@custom_op("fat::gate", mutates_args=())
@launches(GATE)
def gate(local: Tensor, other: Tensor) -> Tensor:
    """Compute SiLU(local) * SiLU(other). Both have the same shape and dtype."""
    from fat.kernels.impl import gate as kernels

    check_feature_maps(local, other)
    out = torch.empty_like(local)
    kernels.gate(local, other, out)
    return out


@gate.register_fake
def _(local: Tensor, other: Tensor) -> Tensor:
    return torch.empty_like(local)


@custom_op("fat::gate_gradient", mutates_args=())
@launches(GATE)
def gate_gradient(grad_out: Tensor, local: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    from fat.kernels.impl import gate as kernels

    check_feature_maps(grad_out, local, other)
    grad_local, grad_other = torch.empty_like(local), torch.empty_like(other)
    kernels.gate_gradient(grad_out, local, other, grad_local, grad_other)
    return grad_local, grad_other


@gate_gradient.register_fake
def _(grad_out: Tensor, local: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(local), torch.empty_like(other)


def _keep_gate(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _gate_backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor]:
    return gate_gradient(channels_last(grad_out), *ctx.saved_tensors)


gate.register_autograd(_gate_backward, setup_context=_keep_gate)

"""Optimisers by name. A new one is an entry here: how it is built, and what state a checkpoint must hold of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

Name = Literal["adamw"]
Form = Literal["fused", "foreach"]
Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class Kind:
    """One optimiser."""

    build: Callable[[Groups, tuple[float, float], float, Form], torch.optim.Optimizer]
    """(parameter groups, betas, eps, form) -> optimiser; the learning rate is set at every step."""
    moments: tuple[str, ...]
    """Names of its per-parameter state of the parameter's own shape; a scalar tensor `step` stands beside them."""


def _adamw(groups: Groups, betas: tuple[float, float], eps: float, form: Form) -> torch.optim.Optimizer:
    fused = form == "fused"
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=fused, foreach=not fused)


def update(optimizer: torch.optim.Optimizer, norm: torch.Tensor) -> None:
    """Step, unless the gradients' norm is not finite.

    A fused optimiser does that on the device, without anybody reading it on the host. Others make the host wait.

    Args:
        norm: float32 scalar.
    """
    if optimizer.defaults["fused"]:
        skip_if_not_finite(optimizer, norm)
        optimizer.step()
    elif norm.isfinite():
        optimizer.step()


def skip_if_not_finite(optimizer: torch.optim.Optimizer, norm: torch.Tensor) -> None:
    """Make the next step of a fused optimiser change nothing if the norm is not finite, which the device decides.

    Args:
        norm: float32 scalar.
    """
    optimizer.grad_scale, optimizer.found_inf = None, norm.isfinite().logical_not().float()  # type: ignore[attr-defined]


OPTIMIZERS: dict[str, Kind] = {"adamw": Kind(_adamw, ("exp_avg", "exp_avg_sq"))}


def parameter_groups(model: nn.Module, weight_decay: float) -> Groups:
    """Two groups: 1-D parameters, biases and what the model names itself have no weight decay; the rest has."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    no_decay: set[str] = getattr(model, "no_weight_decay", set)()
    kept = [p for name, p in named if p.ndim > 1 and name not in no_decay]
    free = [p for name, p in named if p.ndim <= 1 or name in no_decay]
    return [{"params": kept, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]

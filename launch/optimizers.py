"""Optimisers by name. A new one is an entry here: how it is built, and what state a checkpoint must hold of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

Name = Literal["adamw"]
Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class Kind:
    """One optimiser."""

    build: Callable[[Groups, tuple[float, float], float], torch.optim.Optimizer]
    """(parameter groups, betas, eps) -> optimiser; the learning rate is set at every step."""
    moments: tuple[str, ...]
    """Names of its per-parameter state of the parameter's own shape; a scalar tensor `step` stands beside them."""


def _adamw(groups: Groups, betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    # Fused: one pass over memory, and it skips an update on the device where `found_inf` says so.
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)


OPTIMIZERS: dict[str, Kind] = {"adamw": Kind(_adamw, ("exp_avg", "exp_avg_sq"))}


def parameter_groups(model: nn.Module, weight_decay: float) -> Groups:
    """Two groups: 1-D parameters, biases and what the model names itself have no weight decay; the rest has."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    no_decay: set[str] = getattr(model, "no_weight_decay", set)()
    kept = [p for name, p in named if p.ndim > 1 and name not in no_decay]
    free = [p for name, p in named if p.ndim <= 1 or name in no_decay]
    return [{"params": kept, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]

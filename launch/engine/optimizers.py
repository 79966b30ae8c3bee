"""Optimisers by name. A new one is an entry here: how it is built, and what state a checkpoint must hold of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from launch.config.engine import OptimizerImpl

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class Kind:
    """One optimiser."""

    build: Callable[[Groups, tuple[float, float], float, OptimizerImpl], torch.optim.Optimizer]
    """(parameter groups, betas, eps, form) -> optimiser; the learning rate is set at every step."""
    moments: tuple[str, ...]
    """Names of its per-parameter state of the parameter's own shape; a scalar tensor `step` stands beside them."""


def _adamw(groups: Groups, betas: tuple[float, float], eps: float, form: OptimizerImpl) -> torch.optim.Optimizer:
    fused = form == "fused"
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=fused, foreach=not fused)


class Updater:
    """Clips gradients by their global norm and steps, unless it is not finite.

    A fused optimiser does all that on the device, without anybody reading the norm on the host. Others make the host
    wait. For fused AdamW these are torch's own operations, bit by bit, but not torch's Python around them, which looks
    at every parameter a dozen times in every step: hooks of the optimiser are not called.

    Args:
        optimizer: of this module's `OPTIMIZERS`.
        parameters: all of its parameters, in the order of their norms.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Sequence[torch.Tensor]) -> None:
        self._optimizer, self._parameters = optimizer, list(parameters)
        kinds = {(parameter.device, parameter.dtype) for parameter in parameters}
        plain = type(optimizer) is torch.optim.AdamW  # DeepSpeed's has no defaults
        options = optimizer.defaults if plain else {}
        usual = plain and options["fused"] and not (options["amsgrad"] or options["maximize"])
        self._direct = usual and len(kinds) == 1 and all(dtype == torch.float32 for _, dtype in kinds)
        self._groups: list[_Group] = []

    @torch.no_grad()
    def __call__(self, max_norm: float) -> torch.Tensor:
        """Clip and step; returns the norm before clipping, a float32 scalar.

        Args:
            max_norm: 0 = no clipping.
        """
        gradients = [gradient for parameter in self._parameters if (gradient := parameter.grad) is not None]
        if not (self._direct and len(gradients) == len(self._parameters) and self._find_state()):
            norm = nn.utils.clip_grad_norm_(self._parameters, max_norm or math.inf).float()
            _step(self._optimizer, norm)
            return norm
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        if max_norm:
            torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        skip = _not_finite(norm)
        for group in self._groups:
            group.step(skip)
        return norm

    def _find_state(self) -> bool:
        """Look for the optimiser's present state; False where it has none before its first step."""
        if not self._groups or not all(group.is_current(self._optimizer) for group in self._groups):
            state = self._optimizer.state
            if not all(state.get(parameter) for parameter in self._parameters):
                return False
            self._groups = [_Group.of(self._optimizer, options) for options in self._optimizer.param_groups]
        return True


@dataclass(frozen=True)
class _Group:
    """What the fused AdamW of a parameter group works on."""

    options: dict[str, Any]
    parameters: list[torch.Tensor]
    averages: list[torch.Tensor]
    squares: list[torch.Tensor]
    steps: list[torch.Tensor]

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, options: dict[str, Any]) -> _Group:
        states = [optimizer.state[parameter] for parameter in options["params"]]
        lists = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
        return cls(options, list(options["params"]), *lists)

    def is_current(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the optimiser still has this state: a loaded checkpoint brings another, of all parameters."""
        if not self.parameters:
            return True
        state = optimizer.state[self.parameters[0]]
        return state["step"] is self.steps[0] and state["exp_avg"] is self.averages[0]

    def step(self, skip: torch.Tensor) -> None:
        if not self.parameters:
            return
        options, (beta1, beta2) = self.options, self.options["betas"]
        torch._foreach_add_(self.steps, 1)
        torch._fused_adamw_(
            self.parameters,
            [parameter.grad for parameter in self.parameters],  # type: ignore[misc]
            self.averages,
            self.squares,
            [],
            self.steps,
            lr=options["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=options["weight_decay"],
            eps=options["eps"],
            amsgrad=False,
            maximize=False,
            found_inf=skip,
        )
        torch._foreach_sub_(self.steps, [skip] * len(self.steps))


def _step(optimizer: torch.optim.Optimizer, norm: torch.Tensor) -> None:
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
    optimizer.grad_scale, optimizer.found_inf = None, _not_finite(norm)  # type: ignore[attr-defined]


def _not_finite(norm: torch.Tensor) -> torch.Tensor:
    return norm.isfinite().logical_not().float()


OPTIMIZERS: dict[str, Kind] = {"adamw": Kind(_adamw, ("exp_avg", "exp_avg_sq"))}


def parameter_groups(model: nn.Module, weight_decay: float) -> Groups:
    """Two groups: 1-D parameters, biases and what the model names itself have no weight decay; the rest has."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    no_decay: set[str] = getattr(model, "no_weight_decay", set)()
    kept = [p for name, p in named if p.ndim > 1 and name not in no_decay]
    free = [p for name, p in named if p.ndim <= 1 or name in no_decay]
    return [{"params": kept, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]

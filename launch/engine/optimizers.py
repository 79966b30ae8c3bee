"""The optimizers. To add one, add an entry to `OPTIMIZERS`: how to build it, and the state to save in checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from launch.config.engine import OptimizerImpl

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class OptimizerSpec:
    """How to build an optimizer, and the names of its state tensors."""

    build: Callable[[Groups, tuple[float, float], float, OptimizerImpl], torch.optim.Optimizer]
    """(parameter groups, betas, eps, implementation) -> optimizer. The learning rate is set at every step."""
    moments: tuple[str, ...]
    """Names of the state tensors that have the shape of their parameter. A scalar tensor `step` exists in addition."""


def _adamw(groups: Groups, betas: tuple[float, float], eps: float, impl: OptimizerImpl) -> torch.optim.Optimizer:
    fused = impl == "fused"
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=fused, foreach=not fused)


class Updater:
    """Clips gradients by their global norm and steps the optimizer, if the norm is finite.

    With a fused optimizer, all of this runs on the device; otherwise the host waits for the norm. For fused AdamW, the
    results are bitwise equal to PyTorch's. PyTorch's Python code is bypassed, because it visits every parameter a dozen
    times per step; hooks of the optimizer are therefore not called.

    Args:
        optimizer: AdamW of `OPTIMIZERS`, after `create_state`. Its state tensors must not be replaced later.
        parameters: all of its parameters, in the order in which their norms are summed. Each gets a gradient in every
            step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Sequence[torch.Tensor]) -> None:
        self._optimizer, self._parameters = optimizer, list(parameters)
        self._fused: bool = optimizer.defaults["fused"]
        states = [[optimizer.state[p] for p in group["params"]] for group in optimizer.param_groups]
        names = ("exp_avg", "exp_avg_sq", "step")
        self._states = [[[state[name] for state in group] for name in names] for group in states]

    @torch.no_grad()
    def __call__(self, max_norm: float) -> torch.Tensor:
        """Clip and step; return the norm before clipping, a float32 scalar.

        Args:
            max_norm: 0 = no clipping.
        """
        gradients: list[torch.Tensor] = [parameter.grad for parameter in self._parameters]  # type: ignore[misc]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        clip_by_norm(gradients, norm, max_norm)
        if not self._fused:
            if norm.isfinite():
                self._optimizer.step()
            return norm
        skip = _not_finite(norm)
        for options, (averages, squares, steps) in zip(self._optimizer.param_groups, self._states, strict=True):
            if not steps:
                continue
            torch._foreach_add_(steps, 1)
            torch._fused_adamw_(
                options["params"],
                [parameter.grad for parameter in options["params"]],
                averages,
                squares,
                [],
                steps,
                lr=options["lr"],
                beta1=options["betas"][0],
                beta2=options["betas"][1],
                weight_decay=options["weight_decay"],
                eps=options["eps"],
                amsgrad=False,
                maximize=False,
                found_inf=skip,
            )
            torch._foreach_sub_(steps, [skip] * len(steps))
        return norm


def create_state(optimizer: torch.optim.Optimizer, parameters: Sequence[torch.Tensor], moments: Sequence[str]) -> None:
    """Create the state that an optimizer creates in its first step, to load a checkpoint before that step."""
    fused = optimizer.defaults["fused"]  # otherwise the host reads `step` at every step, so it is on the CPU
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.tensor(0.0, device=parameter.device if fused else "cpu"),
            **{moment: torch.zeros_like(parameter, memory_format=torch.preserve_format) for moment in moments},
        }


def clip_by_norm(gradients: list[torch.Tensor], norm: torch.Tensor, max_norm: float) -> None:
    """Scale gradients down so that their global norm is at most `max_norm`, without waiting for the device.

    Args:
        norm: float32 scalar, the current global norm.
        max_norm: 0 = no clipping.
    """
    if max_norm:
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))


def skip_if_not_finite(optimizer: torch.optim.Optimizer, norm: torch.Tensor) -> None:
    """Make the next step of a fused optimizer change nothing if the norm is not finite, without waiting for the device.

    Args:
        norm: float32 scalar.
    """
    optimizer.grad_scale, optimizer.found_inf = None, _not_finite(norm)  # type: ignore[attr-defined]


def _not_finite(norm: torch.Tensor) -> torch.Tensor:
    return norm.isfinite().logical_not().float()


OPTIMIZERS: dict[str, OptimizerSpec] = {"adamw": OptimizerSpec(_adamw, ("exp_avg", "exp_avg_sq"))}


def parameter_groups(model: nn.Module, weight_decay: float) -> Groups:
    """Return two groups of parameters, with and without weight decay.

    1-D parameters, biases and the parameters in `model.no_weight_decay()` have no weight decay.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    excluded: set[str] = getattr(model, "no_weight_decay", set)()
    decay = [p for name, p in named if p.ndim > 1 and name not in excluded]
    no_decay = [p for name, p in named if p.ndim <= 1 or name in excluded]
    return [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]

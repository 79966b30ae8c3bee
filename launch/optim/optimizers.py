"""The optimizers. To add one, add an entry to `OPTIMIZERS`: how to build and step it, and its state in checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from launch.config.engine import OptimizerImpl
from launch.config.optim import OptimConfig
from launch.optim.fine_tuning import classifier_of, layers_of
from launch.optim.lamb import Lamb, lamb_update

Groups = list[dict[str, Any]]
States = dict[str, list[Tensor]]


@dataclass(frozen=True)
class OptimizerSpec:
    """How to build and step an optimizer, and the names of its state tensors."""

    build: Callable[[Groups, OptimConfig, OptimizerImpl], torch.optim.Optimizer]
    """(parameter groups, options, implementation) -> optimizer. The learning rate is set at every step."""
    moments: tuple[str, ...]
    """Names of the state tensors that have the shape of their parameter."""
    fused_update: Callable[[dict[str, Any], list[Tensor], States, Tensor], None]
    """(group, gradients, states by name, skip) -> None: update the parameters of a group on the device. skip: float32
    scalar, 1 = change nothing."""
    counts_steps: bool = True
    """Whether the optimizer has a scalar state tensor `step`, which is incremented before `fused_update`."""
    partitions: bool = True
    """Whether its update is elementwise, so that ZeRO can partition it."""


class Updater:
    """Clips gradients by their global norm and steps the optimizer, if the norm is finite.

    With a fused optimizer, all of this runs on the device; otherwise the host waits for the norm. For fused AdamW and
    SGD, the results are bitwise equal to PyTorch's. PyTorch's Python code is bypassed, because it visits every
    parameter a dozen times per step; hooks of the optimizer are therefore not called.

    Args:
        optimizer: built by `spec`, after `create_state`. Its state tensors must not be replaced later.
        parameters: all of its parameters, in the order in which their norms are summed. Each gets a gradient in every
            step.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[torch.Tensor], spec: OptimizerSpec
    ) -> None:
        self._optimizer, self._parameters, self._spec = optimizer, list(parameters), spec
        self._fused: bool = optimizer.defaults["fused"]
        names = (*spec.moments, *(["step"] if spec.counts_steps else []))
        self._states: list[States] = [
            {name: [optimizer.state[p][name] for p in group["params"]] for name in names}
            for group in optimizer.param_groups
        ]

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
        for options, states in zip(self._optimizer.param_groups, self._states, strict=True):
            steps = states.get("step", ())
            if steps:
                torch._foreach_add_(steps, 1)
            self._spec.fused_update(options, [parameter.grad for parameter in options["params"]], states, skip)
            if steps:
                torch._foreach_sub_(steps, [skip] * len(steps))
        return norm


def create_state(optimizer: torch.optim.Optimizer, parameters: Sequence[torch.Tensor], spec: OptimizerSpec) -> None:
    """Create the state that an optimizer creates in its first step, to load a checkpoint before that step."""
    fused = optimizer.defaults["fused"]  # otherwise the host reads `step` at every step, so it is on the CPU
    for parameter in parameters:
        device = parameter.device if fused else "cpu"
        optimizer.state[parameter] = {
            **({"step": torch.tensor(0.0, device=device)} if spec.counts_steps else {}),
            **{name: torch.zeros_like(parameter, memory_format=torch.preserve_format) for name in spec.moments},
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


def _adamw(groups: Groups, optim: OptimConfig, impl: OptimizerImpl) -> torch.optim.Optimizer:
    fused = impl == "fused"
    return torch.optim.AdamW(groups, lr=0.0, betas=optim.betas, eps=optim.eps, fused=fused, foreach=not fused)


def _adamw_update(options: dict[str, Any], gradients: list[Tensor], states: States, skip: Tensor) -> None:
    torch._fused_adamw_(
        options["params"],
        gradients,
        states["exp_avg"],
        states["exp_avg_sq"],
        [],
        states["step"],
        lr=options["lr"],
        beta1=options["betas"][0],
        beta2=options["betas"][1],
        weight_decay=options["weight_decay"],
        eps=options["eps"],
        amsgrad=False,
        maximize=False,
        found_inf=skip,
    )


def _sgd(groups: Groups, optim: OptimConfig, impl: OptimizerImpl) -> torch.optim.Optimizer:
    fused = impl == "fused"
    return torch.optim.SGD(
        groups, lr=0.0, momentum=optim.momentum, nesterov=optim.nesterov, fused=fused, foreach=not fused
    )


def _sgd_update(options: dict[str, Any], gradients: list[Tensor], states: States, skip: Tensor) -> None:
    torch._fused_sgd_(
        options["params"],
        gradients,
        states["momentum_buffer"] if options["momentum"] else [],
        lr=options["lr"],
        momentum=options["momentum"],
        weight_decay=options["weight_decay"],
        dampening=0.0,
        nesterov=options["nesterov"],
        maximize=False,
        is_first_step=False,  # the buffer of the first step is 0, which gives the same result
        found_inf=skip,
    )


def _lamb(groups: Groups, optim: OptimConfig, impl: OptimizerImpl) -> torch.optim.Optimizer:
    return Lamb(groups, betas=optim.betas, eps=optim.eps)


OPTIMIZERS: dict[str, OptimizerSpec] = {
    "adamw": OptimizerSpec(_adamw, ("exp_avg", "exp_avg_sq"), _adamw_update),
    "sgd": OptimizerSpec(_sgd, ("momentum_buffer",), _sgd_update, counts_steps=False),
    "lamb": OptimizerSpec(_lamb, ("exp_avg", "exp_avg_sq"), lamb_update, partitions=False),
}


def parameter_groups(model: nn.Module, optim: OptimConfig) -> Groups:
    """Return groups of the trained parameters: by layer, with `--layer-decay`, and with and without weight decay.

    1-D parameters, biases and the parameters in `model.no_weight_decay()` have no weight decay. `lr_scale` of a group
    is the factor of its learning rate: decay^(layers above), and in the classifier also `--head-lr-scale`.

    Raises:
        RecipeError: the model's layers or its classifier are unknown, but an option needs them.
    """
    excluded: set[str] = getattr(model, "no_weight_decay", set)()
    layers = layers_of(model) if optim.layer_decay < 1 else {}
    last = max(layers.values(), default=0)
    head = {id(p) for p in classifier_of(model).parameters()} if optim.head_lr_scale != 1 else set()
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = optim.layer_decay ** (last - layers.get(name, last))
        scale *= optim.head_lr_scale if id(parameter) in head else 1.0
        decays = parameter.ndim > 1 and name not in excluded
        group = {"params": [], "weight_decay": optim.weight_decay if decays else 0.0, "lr_scale": scale}
        groups.setdefault((scale, decays), group)["params"].append(parameter)
    return sorted(groups.values(), key=lambda group: (group["lr_scale"], -group["weight_decay"]))

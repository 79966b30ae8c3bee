"""Access to float32 parameters, optimizer moments and EMA, independently of how ZeRO partitions them.

The optimizer updates *owners*: the parameters without ZeRO, this rank's flat partitions of them with ZeRO. State is
saved and loaded in canonical form: full float32 tensors by parameter name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from launch.config.errors import RecipeError
from launch.machine.world import World
from launch.optim.optimizers import OptimizerSpec, clip_by_norm, create_state, skip_if_not_finite

AVERAGE = "ema"


class OptimizerState:
    """Parameters, moments and EMA of a possibly sharded optimizer. All methods but `update_average` are collective.

    Args:
        zero: ZeRO stage; 0 = DDP.
        model: the unwrapped module, after wrapping.
        optimizer: PyTorch's optimizer without ZeRO, else DeepSpeed's wrapper around it.
        spec: the optimizer's entry in `OPTIMIZERS`.
        decay: maximum decay of the EMA (`average_decay`); 0 = no EMA.
    """

    def __init__(
        self, zero: int, model: nn.Module, optimizer: Any, world: World, *, spec: OptimizerSpec, decay: float
    ) -> None:
        self._zero, self._model, self._world, self._decay = zero, model, world, decay
        self._outer, self._spec, self._moments = optimizer, spec, spec.moments
        self._inner = optimizer.optimizer if zero else optimizer
        self._names = {name: p for name, p in model.named_parameters() if p.requires_grad}
        # Parameters that are not trained have no moments and no EMA.
        self._constants: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        if zero == 3 and self._constants:
            raise RecipeError(f"--zero 3: {next(iter(self._constants))} is not trained; use --zero 0, 1 or 2")
        # BatchNorm's running means and variances.
        self._buffers = saved_buffers(model)
        self._statistics = {name: buffer for name, buffer in self._buffers.items() if buffer.is_floating_point()}
        self._create_moments()
        self._ema = [owner.detach().clone() for owner in self._owners()] if decay else []
        self._ema_buffers = [buffer.clone() for buffer in self._statistics.values()] if decay else []

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self._names.values())

    @torch.no_grad()
    def clip_gradients(self, max_norm: float) -> Tensor:
        """Clip ZeRO's reduced gradients by their global norm without waiting for the device. ZeRO 1 and 2 only.

        Call it between the last backward pass of a step and DeepSpeed's `step`. The optimizer must be fused; it then
        skips the update if the norm is not finite.

        Args:
            max_norm: 0 = no clipping.

        Returns:
            float32 scalar: the norm before clipping, equal on all ranks.
        """
        gradients = [gradient for group in self._outer.averaged_gradients.values() for gradient in group]
        norm = nn.utils.get_total_norm(gradients)
        if self._world.size > 1:
            squares = norm.double().square()  # in float32, squares of norms above 1.8e19 overflow
            dist.all_reduce(squares)
            norm = squares.sqrt().float()
        clip_by_norm(gradients, norm, max_norm)
        skip_if_not_finite(self._inner, norm)
        return norm

    @torch.no_grad()
    def update_average(self, step: int) -> None:
        """Update the EMA with the current parameters and BatchNorm statistics, without waiting for device or ranks.

        Args:
            step: index of the last optimizer step, counted from 0 at the start of training.
        """
        if self._decay:
            weight = 1 - average_decay(self._decay, step + 1)
            torch._foreach_lerp_(self._ema, [owner.detach() for owner in self._owners()], weight)
            for average, buffer in zip(self._ema_buffers, self._statistics.values(), strict=True):
                # After a bad step, statistics may not be finite until the guards restore them.
                average.lerp_(torch.where(buffer.isfinite(), buffer, average), weight)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Return a context in which the module has the weights and statistics of the EMA."""
        # With ZeRO, the module's weights are separate from those that the optimizer updates. They are gathered before
        # the context is entered, because a rank that exits it with an error must not run a collective.
        current = self._gathered() if self._zero else {}
        self._swap_average()
        self._write_module(self._gathered() if self._zero else {})
        try:
            yield
        finally:
            self._swap_average()
            self._write_module(current)

    @property
    def statistics(self) -> list[Tensor]:
        """BatchNorm's running means and variances (not copies)."""
        return list(self._statistics.values())

    @property
    def averaged_statistics(self) -> list[Tensor]:
        """BatchNorm's running means and variances in the EMA (not copies)."""
        return self._ema_buffers

    def state_dict(self) -> dict[str, Tensor]:
        """Return `model/NAME` (parameters, buffers), `MOMENT/NAME` such as `exp_avg/NAME`, and with an EMA `ema/NAME`.

        Tensors may share memory with the model: copy them before the next step.
        """
        state = {f"model/{name}": value for name, value in self._gathered().items()}
        for moment in self._moments:
            state |= {f"{moment}/{name}": value for name, value in self._gathered(moment).items()}
        state |= {f"model/{name}": tensor.detach() for name, tensor in (self._constants | self._buffers).items()}
        if self._decay:
            self._swap_average()
            average = self._gathered() | self._statistics
            state |= {f"{AVERAGE}/{name}": value.detach().clone() for name, value in average.items()}
            self._swap_average()
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor], *, steps: int) -> None:
        """Load a `state_dict`, saved after `steps` optimizer steps. Collective: every rank passes the same state.

        If the state has no EMA, it starts from the parameters of the state.

        Raises:
            ValueError: tensors are missing, unknown, or of another shape or dtype; the message names them, and nothing
                was loaded.
        """
        if mismatch := self._describe_mismatch(state):
            raise ValueError(mismatch)
        if self._decay:
            average = weights_of(state, average=True) or weights_of(state)
            self._write_owners(average)
            torch._foreach_copy_(self._ema, self._owners())
            for name, buffer in zip(self._statistics, self._ema_buffers, strict=True):
                buffer.copy_(average[name])
        weights = weights_of(state)
        for name, tensor in (self._constants | self._buffers).items():
            tensor.copy_(weights[name])
        self._write_module({name: weights[name] for name in self._names})
        self._write_owners(weights)
        for moment in self._moments:
            self._write_owners({name: state[f"{moment}/{name}"] for name in self._names}, moment)
        if self._spec.counts_steps:
            for owner in self._owners():
                self._inner.state[owner]["step"].fill_(steps)

    def _describe_mismatch(self, state: dict[str, Tensor]) -> str:
        """Return how a state differs from the one that this model saves, or an empty string."""
        shapes = {name: torch.Size(getattr(p, "ds_shape", p.shape)) for name, p in self._names.items()}
        parameters = {name: (shape, torch.float32) for name, shape in shapes.items()}
        buffers = {name: (buffer.shape, buffer.dtype) for name, buffer in self._buffers.items()}
        constants = {name: (tensor.shape, tensor.dtype) for name, tensor in self._constants.items()}
        kinds = {"model": parameters | constants | buffers} | dict.fromkeys(self._moments, parameters)
        if any(key.startswith(f"{AVERAGE}/") for key in state):
            kinds[AVERAGE] = parameters | {name: buffers[name] for name in self._statistics}
        expected = {f"{kind}/{name}": entry for kind, entries in kinds.items() for name, entry in entries.items()}
        differing = [
            f"{key} is {list(state[key].shape)} {state[key].dtype}, expected {list(shape)} {dtype}"
            for key, (shape, dtype) in expected.items()
            if key in state and (state[key].shape, state[key].dtype) != (shape, dtype)
        ]
        found = {
            "missing": sorted(expected.keys() - state.keys()),
            "unknown": sorted(state.keys() - expected.keys()),
            "of another shape or dtype": differing,
        }
        return "; ".join(f"{len(keys)} {kind}, such as {keys[0]}" for kind, keys in found.items() if keys)

    # -- owners --------------------------------------------------------------------------------------------------

    def _owners(self) -> list[Tensor]:
        if self._zero == 0:
            return list(self._names.values())
        if self._zero == 3:
            return list(self._outer.fp32_partitioned_groups_flat)
        return list(self._outer.single_partition_of_fp32_groups)

    def _create_moments(self) -> None:
        create_state(self._inner, self._owners(), self._spec)
        if self._zero in (1, 2):
            from deepspeed.utils import lazy_init_hp_params_optimizer_state

            for parameters, owner in zip(self._outer.bit16_groups, self._owners(), strict=True):
                lazy_init_hp_params_optimizer_state(parameters, owner, self._inner.state)

    @torch.no_grad()
    def _swap_average(self) -> None:
        """Swap the EMA with the current values, so that methods that gather parameters gather the EMA."""
        average = [*self._ema, *self._ema_buffers]
        for x, y in zip([*self._owners(), *self._statistics.values()], average, strict=True):
            copy = x.detach().clone()
            x.copy_(y)
            y.copy_(copy)

    # -- full tensors --------------------------------------------------------------------------------------------

    def _gathered(self, moment: str = "") -> dict[str, Tensor]:
        """Return the full float32 values of the parameters, or of one of their moments, by name."""
        if not self._zero:
            states = self._inner.state
            return {name: states[p][moment] if moment else p.detach() for name, p in self._names.items()}
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        return {
            name: safe_get_full_optimizer_state(p, moment) if moment else safe_get_full_fp32_param(p)
            for name, p in self._names.items()
        }

    @torch.no_grad()
    def _write_module(self, values: dict[str, Tensor]) -> None:
        """Write full values to the parameters that the forward pass uses."""
        gathered: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self._zero == 3:
            from deepspeed.runtime.zero import GatheredParameters

            gathered = GatheredParameters(list(self._names.values()), modifier_rank=0)
        with gathered:
            for name, value in values.items():
                self._names[name].copy_(value)

    def _write_owners(self, values: dict[str, Tensor], moment: str = "") -> None:
        """Write full values to the float32 parameters that the optimizer updates, or to one of their moments."""
        if not self._zero:
            for name, target in self._gathered(moment).items():
                target.copy_(values[name])
            return
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        for name, parameter in self._names.items():
            value = values[name].to(self._world.device)
            if self._zero == 3:
                value = self._own_partition(parameter, value)
                write, write_moment = safe_set_local_fp32_param, safe_set_local_optimizer_state
            else:
                write, write_moment = safe_set_full_fp32_param, safe_set_full_optimizer_state
            write_moment(parameter, value, moment) if moment else write(parameter, value)

    def _own_partition(self, parameter: Any, value: Tensor) -> Tensor:
        """Return this rank's slice of a ZeRO-3 parameter, with padding, which DeepSpeed's `safe_set_full_*` omit."""
        size = parameter.partition_numel()
        flat = value.flatten()
        padded = nn.functional.pad(flat, (0, size * self._world.size - flat.numel()))
        return padded.narrow(0, size * self._world.rank, size)


def saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that are in the model's `state_dict`, by name. Models recompute others, such as masks."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


def weights_of(state: dict[str, Tensor], *, average: bool = False) -> dict[str, Tensor]:
    """Return the weights and buffers in a canonical state, by their names in the model.

    Args:
        average: return those of the EMA; empty if the state has none.
    """

    def tensors(kind: str) -> dict[str, Tensor]:
        return {key.removeprefix(f"{kind}/"): value for key, value in state.items() if key.startswith(f"{kind}/")}

    averages = tensors(AVERAGE)
    if average:
        return tensors("model") | averages if averages else {}
    return tensors("model")


def average_decay(decay: float, updates: int) -> float:
    """Return the EMA's decay in update number `updates`, counted from 1.

    It is smaller in the first updates, so that the EMA of a short run does not contain its random initialization.
    Source: TensorFlow, `tf.train.ExponentialMovingAverage` with `num_updates`.
    """
    return min(decay, (1 + updates) / (10 + updates))

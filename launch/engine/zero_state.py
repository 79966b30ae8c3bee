"""The float32 parameters and the optimiser's moments, wherever ZeRO keeps them, and their moving average.

The optimiser works on *owners*: the parameters themselves without ZeRO, this rank's flat partitions of them with ZeRO.
What goes out and comes in here is canonical: full float32 tensors by parameter name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from launch.engine.optimizers import skip_if_not_finite
from launch.machine.world import World

AVERAGE = "ema"


class OptimizerState:
    """Full views of a sharded optimiser. Everything but `update_average` is collective.

    Args:
        zero: ZeRO stage; 0 = plain.
        model: the bare module, after wrapping.
        optimizer: torch's own without ZeRO, else DeepSpeed's wrapper around it.
        moments: names of the optimiser's state tensors.
        decay: of the moving average, in the long run (`average_decay`); 0 = none.
    """

    def __init__(
        self, zero: int, model: nn.Module, optimizer: Any, world: World, *, moments: Sequence[str], decay: float
    ) -> None:
        self._zero, self._model, self._world, self._decay = zero, model, world, decay
        self._outer, self._moments = optimizer, moments
        self._inner = optimizer.optimizer if zero else optimizer
        self._names = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._create_moments(steps=0)
        self._shadow = [owner.detach().clone() for owner in self._owners()] if decay else []
        self._shadow_buffers = [b.clone() for b in self._buffers()] if decay else []

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self._names.values())

    @property
    def clips_gradients(self) -> bool:
        """Whether `clip_gradients` must be called before the optimiser steps: DeepSpeed was told not to do it."""
        return not getattr(self._outer, "compute_grad_norm", True)

    @torch.no_grad()
    def clip_gradients(self, max_norm: float) -> Tensor:
        """Clip ZeRO's reduced gradients by their global norm, on the device alone. Collective, ZeRO 1 and 2 only.

        To be called between the last backward pass of a step and DeepSpeed's `step`, with a fused optimiser, which then
        skips its update where the norm is not finite.

        Args:
            max_norm: 0 = no clipping.

        Returns:
            float32 scalar: the norm before clipping, the same on every rank.
        """
        gradients = [gradient for group in self._outer.averaged_gradients.values() for gradient in group]
        norm = nn.utils.get_total_norm(gradients)
        if self._world.size > 1:
            squares = norm.double().square()  # float32 overflows at norms above 1.8e19
            dist.all_reduce(squares)
            norm = squares.sqrt().float()
        if max_norm:
            torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        skip_if_not_finite(self._inner, norm)
        return norm

    @torch.no_grad()
    def update_average(self, step: int) -> None:
        """Move the average towards the present parameters and BatchNorm statistics. Local to the rank, no sync.

        Args:
            step: the optimiser step just made, counted from 0 at the start of training.
        """
        if self._decay:
            share = 1 - average_decay(self._decay, step + 1)
            torch._foreach_lerp_(self._shadow, [owner.detach() for owner in self._owners()], share)
            for shadow, buffer in zip(self._shadow_buffers, self._buffers(), strict=True):
                # A bad forward pass leaves statistics that are not finite until the guards mend them.
                shadow.lerp_(torch.where(buffer.isfinite(), buffer, shadow), share)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The module holds the moving average in here."""
        with self._swapped_buffers():
            with self._swapped_owners():
                average = {name: self._full(parameter) for name, parameter in self._names.items()}
                average = {name: value.clone() for name, value in average.items()}
            present = {name: self._full(parameter).clone() for name, parameter in self._names.items()}
            self._write_module(average)
            try:
                yield
            finally:
                self._write_module(present)

    @property
    def averaged_statistics(self) -> list[Tensor]:
        """BatchNorm's running means and variances in the moving average, live."""
        return self._shadow_buffers

    def state_dict(self) -> dict[str, Tensor]:
        """`model/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME`, buffers, and with an average `ema/NAME`.

        Tensors may be views of live ones: copy before the next step.
        """
        self._link_moments()
        state = {f"model/{name}": self._full(parameter) for name, parameter in self._names.items()}
        for moment in self._moments:
            state |= {f"{moment}/{name}": self._moment(parameter, moment) for name, parameter in self._names.items()}
        state |= {f"model/{name}": buffer for name, buffer in self._model.named_buffers()}
        if self._decay:
            with self._swapped_owners():
                state |= {f"{AVERAGE}/{name}": self._full(p).clone() for name, p in self._names.items()}
            floats = [name for name, buffer in self._model.named_buffers() if buffer.is_floating_point()]
            state |= {f"{AVERAGE}/{name}": value for name, value in zip(floats, self._shadow_buffers, strict=True)}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor], *, steps: int) -> None:
        """Take back what `state_dict` gave, on every rank alike; `steps` optimiser steps lie behind it.

        An average that the state lacks starts from its parameters.

        Raises:
            ValueError: names the tensors that are missing, unknown, or of another shape or dtype; nothing was loaded.
        """
        if faults := self._faults(state):
            raise ValueError(faults)
        buffers = dict(self._model.named_buffers())
        if self._decay:
            kind = AVERAGE if f"{AVERAGE}/{next(iter(self._names))}" in state else "model"
            self._write_masters({name: state[f"{kind}/{name}"] for name in self._names})
            for shadow, owner in zip(self._shadow, self._owners(), strict=True):
                shadow.copy_(owner)
            floats = [name for name, buffer in buffers.items() if buffer.is_floating_point()]
            for name, shadow in zip(floats, self._shadow_buffers, strict=True):
                shadow.copy_(state[f"{kind}/{name}"])
        for name, buffer in buffers.items():
            buffer.copy_(state[f"model/{name}"])
        values = {name: state[f"model/{name}"] for name in self._names}
        self._write_module(values)
        self._write_masters(values)
        self._create_moments(steps)
        self._link_moments()
        for name, parameter in self._names.items():
            for moment in self._moments:
                self._set_moment(parameter, moment, state[f"{moment}/{name}"].to(self._world.device))

    def _faults(self, state: dict[str, Tensor]) -> str:
        """What is wrong with a state; empty where it fits."""
        buffers = dict(self._model.named_buffers())
        shapes = {name: torch.Size(getattr(p, "ds_shape", p.shape)) for name, p in self._names.items()}
        parameters = {name: (shape, torch.float32) for name, shape in shapes.items()}
        statistics = {name: (buffer.shape, buffer.dtype) for name, buffer in buffers.items()}
        averaged = parameters | {name: entry for name, entry in statistics.items() if entry[1].is_floating_point}
        kinds = {"model": parameters | statistics} | dict.fromkeys(self._moments, parameters)
        if any(key.startswith(f"{AVERAGE}/") for key in state):
            kinds[AVERAGE] = averaged
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
        return "; ".join(f"{len(keys)} {fault}, such as {keys[0]}" for fault, keys in found.items() if keys)

    # -- owners --------------------------------------------------------------------------------------------------

    def _owners(self) -> list[Tensor]:
        if self._zero == 0:
            return list(self._names.values())
        if self._zero == 3:
            return list(self._outer.fp32_partitioned_groups_flat)
        return list(self._outer.single_partition_of_fp32_groups)

    def _buffers(self) -> list[Tensor]:
        return [buffer for buffer in self._model.buffers() if buffer.is_floating_point()]

    @contextlib.contextmanager
    def _swapped_owners(self) -> Iterator[None]:
        """The owners hold the average in here, so that what gathers parameters gathers the average."""
        _exchange(self._owners(), self._shadow)
        try:
            yield
        finally:
            _exchange(self._owners(), self._shadow)

    @contextlib.contextmanager
    def _swapped_buffers(self) -> Iterator[None]:
        _exchange(self._buffers(), self._shadow_buffers)
        try:
            yield
        finally:
            _exchange(self._buffers(), self._shadow_buffers)

    # -- full tensors --------------------------------------------------------------------------------------------

    def _full(self, parameter: nn.Parameter) -> Tensor:
        if not self._zero:
            return parameter.detach()
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter)

    def _moment(self, parameter: nn.Parameter, moment: str) -> Tensor:
        if not self._zero:
            return self._inner.state[parameter][moment]
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(parameter, moment)

    @torch.no_grad()
    def _write_module(self, values: dict[str, Tensor]) -> None:
        """Put full values into the parameters that the forward pass uses."""
        gathered: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self._zero == 3:
            from deepspeed.runtime.zero import GatheredParameters

            gathered = GatheredParameters(list(self._names.values()), modifier_rank=0)
        with gathered:
            for name, parameter in self._names.items():
                parameter.copy_(values[name])

    def _write_masters(self, values: dict[str, Tensor]) -> None:
        """Put full values into the float32 masters that the optimiser works on."""
        if not self._zero:
            self._write_module(values)
            return
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        for name, parameter in self._names.items():
            value = values[name].to(self._world.device)
            if self._zero == 3:
                safe_set_local_fp32_param(parameter, self._own_partition(parameter, value))
            else:
                safe_set_full_fp32_param(parameter, value)

    def _set_moment(self, parameter: nn.Parameter, moment: str, value: Tensor) -> None:
        if not self._zero:
            self._inner.state[parameter][moment].copy_(value)
            return
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self._zero == 3:
            safe_set_local_optimizer_state(parameter, self._own_partition(parameter, value), moment)
        else:
            safe_set_full_optimizer_state(parameter, value, moment)

    def _own_partition(self, parameter: Any, value: Tensor) -> Tensor:
        """This rank's slice of a ZeRO-3 parameter, padded (which DeepSpeed's own full setters forget)."""
        size = parameter.partition_numel()
        flat = value.flatten()
        padded = nn.functional.pad(flat, (0, size * self._world.size - flat.numel()))
        return padded.narrow(0, size * self._world.rank, size)

    def _create_moments(self, steps: int) -> None:
        """Give the optimiser the state that it makes at its first step, moments zero, `steps` steps on."""
        fused = self._inner.defaults["fused"]  # else the host reads the number of steps at every step
        for owner in self._owners():
            self._inner.state[owner] = {
                "step": torch.tensor(float(steps), device=owner.device if fused else "cpu"),
                **{moment: torch.zeros_like(owner, memory_format=torch.preserve_format) for moment in self._moments},
            }

    def _link_moments(self) -> None:
        """ZeRO 1 and 2 find a parameter's moments by links, which they make for the first parameter group only."""
        if self._zero not in (1, 2):
            return
        for parameters, owner in zip(self._outer.bit16_groups, self._owners(), strict=True):
            for parameter in parameters:
                if parameter._hp_mapping is not None:
                    parameter._hp_mapping.set_optim_state_fragment(owner, self._inner.state[owner])


def weights_of(state: dict[str, Tensor], *, average: bool = False) -> dict[str, Tensor]:
    """Select the model's tensors of a canonical state, by their names in the model.

    Args:
        average: those of the moving average; empty if the state has none.
    """

    def tensors(kind: str) -> dict[str, Tensor]:
        return {key.removeprefix(f"{kind}/"): value for key, value in state.items() if key.startswith(f"{kind}/")}

    averages = tensors(AVERAGE)
    if average:
        return tensors("model") | averages if averages else {}
    return tensors("model")


def average_decay(decay: float, updates: int) -> float:
    """Return the decay of the moving average's update number `updates`, counted from 1.

    The first updates decay faster, so that a short run's average does not consist of its random start. Source:
    TensorFlow, `tf.train.ExponentialMovingAverage` with `num_updates`.
    """
    return min(decay, (1 + updates) / (10 + updates))


@torch.no_grad()
def _exchange(a: list[Tensor], b: list[Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        kept = x.detach().clone()
        x.copy_(y)
        y.copy_(kept)

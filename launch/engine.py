"""Model + optimiser -> a step, on one process or many, plain (DDP) or with DeepSpeed's ZeRO.

The only file that knows accelerate and DeepSpeed. What it gives out (`state_dict`) and takes back is canonical: full
float32 tensors by parameter name, the same whatever the world size and ZeRO stage.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from launch.loss import count_correct, soft_cross_entropy
from launch.recipe import Recipe, RecipeError
from launch.world import World
from pipeline.loader import Batch
from pipeline.rng import Stream, seed64

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class StepResult:
    """What a step leaves on the device; nothing is waited for."""

    loss: Tensor
    """float32 scalar: mean over this rank's rows."""
    grad_norm: Tensor
    """float32 scalar: global norm before clipping."""


def choose(recipe: Recipe, device: torch.device) -> tuple[Literal[0, 1, 2, 3], Literal["bf16", "fp32"]]:
    """ZeRO stage and precision of the recipe on this device."""
    cuda = device.type == "cuda"
    zero = (1 if cuda else 0) if recipe.run.zero == "auto" else recipe.run.zero
    precision = ("bf16" if cuda else "fp32") if recipe.run.precision == "auto" else recipe.run.precision
    return zero, precision


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: 1-D parameters, biases and what the model names itself have no weight decay."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    no_decay: set[str] = getattr(model, "no_weight_decay", set)()
    kept = [p for name, p in named if p.ndim > 1 and name not in no_decay]
    free = [p for name, p in named if p.ndim <= 1 or name in no_decay]
    return [{"params": kept, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


class Engine:
    """A model in training.

    Args:
        model: on the CPU; moved and wrapped here.
        recipe: optimiser, precision, ZeRO stage.
        world: from `connect`.
        micro_batch, accumulation: rows per forward pass and passes per step of this rank.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, world: World, *, micro_batch: int, accumulation: int) -> None:
        self.world = world
        self.zero, self.precision = choose(recipe, world.device)
        self._recipe = recipe
        self._accumulation = accumulation
        model = model.to(world.device)
        if world.device.type == "cuda" and world.size > 1:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        if self.zero == 0:
            # DeepSpeed cannot broadcast channels-last weights; there, only activations are channels-last.
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model = model
        self._names = {name: p for name, p in model.named_parameters() if p.requires_grad}
        optim = recipe.optim
        optimizer = torch.optim.AdamW(
            parameter_groups(model, optim.weight_decay),
            lr=0.0,
            betas=optim.betas,
            eps=optim.eps,
            fused=True,
        )
        self._wrapped, self._optimizer = self._prepare(model, optimizer, micro_batch)

    @property
    def description(self) -> str:
        """For people: engine and precision."""
        return f"{f'DeepSpeed ZeRO-{self.zero}' if self.zero else 'plain data parallel'}, {self.precision}"

    @property
    def input_dtype(self) -> torch.dtype:
        """Dtype in which images should come."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def step(self, batches: Sequence[Batch], *, step: int, lr: float) -> StepResult:
        """One optimiser step over this rank's micro-batches.

        Args:
            batches: as many as `accumulation`.
            step: global step number, which (with seed and rank) seeds drop path.
            lr: learning rate of this step.
        """
        torch.manual_seed(seed64(Stream.DROP_PATH, self._recipe.run.seed, step, self.world.rank))
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._wrapped.train()
        run = self._deepspeed_step if self.zero else self._plain_step
        return run(batches)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Accuracy over all ranks' batches: samples, top1, top5 (shares) and loss. Collective."""
        self.average_statistics()
        self._wrapped.eval()
        totals = torch.zeros(4, dtype=torch.float64, device=self.world.device)
        for batch in batches:
            with self._autocast():
                # The bare module: wrappers would add collectives, and ranks without samples still run here.
                logits = self.model(batch.images)
            totals += count_correct(logits, batch)
        if self.world.size > 1:
            dist.all_reduce(totals)
        samples, top1, top5, loss = totals.tolist()
        return {"samples": int(samples), "top1": top1 / samples, "top5": top5 / samples, "loss": loss / samples}

    def average_statistics(self) -> None:
        """Make BatchNorm's running statistics the mean over ranks; SyncBatchNorm's are already. Collective."""
        if self.world.size == 1:
            return
        buffers = [b for b in self.model.buffers() if b.is_floating_point()]
        flat = torch.cat([b.flatten() for b in buffers]) / self.world.size
        dist.all_reduce(flat)
        for buffer, part in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
            buffer.copy_(part.view_as(buffer))

    def state_dict(self) -> dict[str, Tensor]:
        """Canonical state: `model/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME`, full tensors, float32 on the CPU.

        Collective: every rank must call it; the result is complete on rank 0 and empty elsewhere.
        """
        state: dict[str, Tensor] = {}
        self.average_statistics()
        self._link_moments()
        for name, parameter in self._names.items():
            state[f"model/{name}"] = self._full(parameter)
            for moment in MOMENTS:
                state[f"{moment}/{name}"] = self._moment(parameter, moment)
        state |= {f"model/{name}": buffer for name, buffer in self.model.named_buffers()}
        if not self.world.is_main:
            return {}
        # Copies, so that training may go on while they are written.
        return {key: value.detach().to("cpu", copy=True).contiguous() for key, value in state.items()}

    def load_state_dict(self, state: dict[str, Tensor], *, steps: int) -> None:
        """Take back what `state_dict` gave, on every rank alike. `steps` >= 1 optimiser steps lie behind it.

        Raises:
            RecipeError: the state is of another model.
        """
        wanted = {f"model/{name}" for name in (*self._names, *(name for name, _ in self.model.named_buffers()))}
        odd = sorted(wanted ^ {key for key in state if key.startswith("model/")})
        if odd:
            raise RecipeError(
                f"the checkpoint is of another model: {len(odd)} names differ, such as {odd[0].split('/')[1]}; "
                "use its recipe, or another run folder (--out)"
            )
        for name, buffer in self.model.named_buffers():
            buffer.copy_(state[f"model/{name}"])
        self._set_parameters(state)
        self._create_moments(steps)
        self._link_moments()
        for name, parameter in self._names.items():
            for moment in MOMENTS:
                self._set_moment(parameter, moment, state[f"{moment}/{name}"])

    # -- plain ---------------------------------------------------------------------------------------------------

    def _plain_step(self, batches: Sequence[Batch]) -> StepResult:
        total = torch.zeros((), device=self.world.device)
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            with self._gradients_stay_here(not last):
                with self._autocast():
                    logits = self._wrapped(batch.images)
                loss = soft_cross_entropy(logits, batch, self._recipe.optim.label_smoothing) / len(batches)
                loss.backward()
            total += loss.detach()
        clip = self._recipe.optim.clip_grad or float("inf")
        norm = nn.utils.clip_grad_norm_(self._names.values(), clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return StepResult(total, norm.detach().float())

    def _gradients_stay_here(self, wanted: bool) -> contextlib.AbstractContextManager[Any]:
        """DDP exchanges gradients at the last micro-batch only."""
        return self._wrapped.no_sync() if wanted and self.world.size > 1 else contextlib.nullcontext()

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.world.device.type, torch.bfloat16)

    # -- DeepSpeed -----------------------------------------------------------------------------------------------

    def _deepspeed_step(self, batches: Sequence[Batch]) -> StepResult:
        total = torch.zeros((), device=self.world.device)
        for number, batch in enumerate(batches):
            self._wrapped.set_gradient_accumulation_boundary(number == len(batches) - 1)
            loss = soft_cross_entropy(self._wrapped(batch.images), batch, self._recipe.optim.label_smoothing)
            self._wrapped.backward(loss)  # divides by the number of micro-batches itself
            self._wrapped.step()
            total += loss.detach() / len(batches)
        norm = self._wrapped.get_global_grad_norm()
        return StepResult(total, torch.as_tensor(float("nan") if norm is None else norm, dtype=torch.float32))

    def _deepspeed_config(self, micro_batch: int) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": self._accumulation,
            "gradient_clipping": self._recipe.optim.clip_grad,
            "zero_optimization": {"stage": self.zero, "overlap_comm": self.world.device.type == "cuda"},
            # DeepSpeed's own "bf16" breaks BatchNorm; autocast keeps parameters, statistics and moments in float32.
            "torch_autocast": {"enabled": self.precision == "bf16", "dtype": "bfloat16"},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "wall_clock_breakdown": False,
            "steps_per_print": 2**31,
        }

    # -- wrapping ------------------------------------------------------------------------------------------------

    def _prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer, micro_batch: int) -> tuple[Any, Any]:
        cuda = self.world.device.type == "cuda"
        if not cuda:
            # accelerate decides by these: "use CPU" would silently bypass DeepSpeed, and is what plain gloo ranks need.
            os.environ["DS_ACCELERATOR"] = "cpu"
            if self.zero:
                os.environ.pop("ACCELERATE_USE_CPU", None)
            else:
                os.environ["ACCELERATE_USE_CPU"] = "true"
        if self.zero and not dist.is_initialized():
            # DeepSpeed wants a process group even for one process; this one needs no port.
            for name, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}.items():
                os.environ.setdefault(name, str(value))
            dist.init_process_group("nccl" if cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1)

        from accelerate import Accelerator, DistributedDataParallelKwargs
        from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs

        # Buffers are averaged when they matter (`average_statistics`), not broadcast at every step.
        handlers: list[Any] = [DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)]
        if dist.is_initialized():
            handlers.append(InitProcessGroupKwargs(backend=dist.get_backend()))
        plugin = DeepSpeedPlugin(hf_ds_config=self._deepspeed_config(micro_batch)) if self.zero else None
        accelerator = Accelerator(mixed_precision="no", deepspeed_plugin=plugin, kwargs_handlers=handlers)
        self._check_agreement(accelerator)
        with warnings.catch_warnings():
            # `broadcast_buffers` has a new name in the newest torch only.
            warnings.simplefilter("ignore", FutureWarning)
            wrapped, _ = accelerator.prepare(model, optimizer)
        if self.zero:
            self.model = wrapped.module
            self._names = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
            return wrapped, wrapped.optimizer
        return wrapped, optimizer

    def _check_agreement(self, accelerator: Any) -> None:
        """The traps of launching end here: ranks that each believe to be alone would train apart without a word."""
        kind = accelerator.distributed_type.value
        joined = dist.get_world_size() if dist.is_initialized() else 1
        alone = kind == "NO"
        seen = accelerator.num_processes
        if joined != self.world.size or seen != self.world.size or (alone and self.world.size > 1):
            raise RecipeError(
                f"WORLD_SIZE is {self.world.size}, torch.distributed sees {joined}, accelerate {seen} processes of "
                f"type {kind}: the ranks would not train together; launch with 'accelerate launch "
                "--multi_gpu --num_processes N launch/train.py ...' (on CPUs too)"
            )
        if bool(self.zero) != (kind == "DEEPSPEED"):
            raise RecipeError(
                f"--zero {self.zero} asked for, but accelerate chose {kind}; do not set ACCELERATE_USE_DEEPSPEED or a "
                "DeepSpeed configuration in the launcher: the recipe decides"
            )

    # -- canonical state -----------------------------------------------------------------------------------------

    def _full(self, parameter: nn.Parameter) -> Tensor:
        if not self.zero:
            return parameter
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter)

    def _moment(self, parameter: nn.Parameter, moment: str) -> Tensor:
        if not self.zero:
            return self._optimizer.state[parameter][moment]
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(parameter, moment)

    def _set_parameters(self, state: dict[str, Tensor]) -> None:
        values = {parameter: state[f"model/{name}"].to(self.world.device) for name, parameter in self._names.items()}
        if self.zero == 3:
            from deepspeed.runtime.zero import GatheredParameters

            with torch.no_grad(), GatheredParameters(list(values), modifier_rank=0):
                for parameter, value in values.items():
                    parameter.copy_(value)
        else:
            with torch.no_grad():
                for parameter, value in values.items():
                    parameter.copy_(value)
        if self.zero:  # the float32 masters that the optimiser works on
            from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

            for parameter, value in values.items():
                if self.zero == 3:
                    safe_set_local_fp32_param(parameter, self._own_partition(parameter, value))
                else:
                    safe_set_full_fp32_param(parameter, value)

    def _set_moment(self, parameter: nn.Parameter, moment: str, value: Tensor) -> None:
        value = value.to(self.world.device)
        if not self.zero:
            self._optimizer.state[parameter][moment].copy_(value)
            return
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.zero == 3:
            safe_set_local_optimizer_state(parameter, self._own_partition(parameter, value), moment)
        else:
            safe_set_full_optimizer_state(parameter, value, moment)

    def _own_partition(self, parameter: Any, value: Tensor) -> Tensor:
        """This rank's slice of a ZeRO-3 parameter, padded (which DeepSpeed's own full setters forget)."""
        size = parameter.partition_numel()
        flat = value.flatten()
        padded = nn.functional.pad(flat, (0, size * self.world.size - flat.numel()))
        return padded.narrow(0, size * self.world.rank, size)

    def _create_moments(self, steps: int) -> None:
        """Give the optimiser the state that it makes at its first step, moments zero, `steps` steps on."""
        inner = self._wrapped.optimizer.optimizer if self.zero else self._optimizer
        if self.zero == 0:
            owners: list[Tensor] = list(self._names.values())
        elif self.zero == 3:
            owners = list(self._wrapped.optimizer.fp32_partitioned_groups_flat)
        else:
            owners = list(self._wrapped.optimizer.single_partition_of_fp32_groups)
        for owner in owners:
            inner.state[owner] = {
                "step": torch.tensor(float(steps), device=owner.device),
                **{moment: torch.zeros_like(owner, memory_format=torch.preserve_format) for moment in MOMENTS},
            }

    def _link_moments(self) -> None:
        """ZeRO 1 and 2 find a parameter's moments by links made after the first step, for the first group only."""
        if self.zero not in (1, 2):
            return
        optimizer = self._wrapped.optimizer
        for parameters, owner in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
            for parameter in parameters:
                if parameter._hp_mapping is not None:
                    parameter._hp_mapping.set_optim_state_fragment(owner, optimizer.optimizer.state[owner])

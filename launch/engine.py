"""Model + optimiser -> a step, on one process or many, plain (DDP) or with DeepSpeed's ZeRO.

The only file that knows accelerate; with `launch/masters.py` the only one that knows DeepSpeed.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from launch.loss import count_correct, soft_cross_entropy
from launch.masters import Masters
from launch.norms import GlobalBatchNorm, batch_norms, synchronise_norms
from launch.optimizers import OPTIMIZERS, parameter_groups
from launch.recipe import Recipe, RecipeError
from launch.tuning import Choice, choose_mode
from launch.world import World
from pipeline.loader import Batch
from pipeline.rng import Stream, seed64


@dataclass(frozen=True)
class StepResult:
    """What a step leaves on the device; reading it would wait for the step (DeepSpeed's norm has been read already)."""

    loss: Tensor
    """float32 scalar: mean over this rank's rows."""
    grad_norm: Tensor
    """float32 scalar: global norm before clipping, the same on every rank; not finite = the update was skipped."""


def choose(recipe: Recipe, device: torch.device) -> tuple[Literal[0, 1, 2, 3], Literal["bf16", "fp32"]]:
    """ZeRO stage and precision of the recipe on this device."""
    cuda = device.type == "cuda"
    zero = (1 if cuda else 0) if recipe.run.zero == "auto" else recipe.run.zero
    precision = ("bf16" if cuda else "fp32") if recipe.run.precision == "auto" else recipe.run.precision
    return zero, precision


class Engine:
    """A model in training.

    Args:
        model: on the CPU; moved and wrapped here.
        recipe: optimiser, precision, ZeRO stage, BatchNorm, compilation.
        world: from `connect`.
        micro_batch, accumulation: rows per forward pass and passes per step of this rank.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, world: World, *, micro_batch: int, accumulation: int) -> None:
        self.world = world
        self.zero, self.precision = choose(recipe, world.device)
        self._recipe = recipe
        self._accumulation = accumulation
        model = model.to(world.device)
        if self.zero == 0:
            # DeepSpeed cannot broadcast channels-last weights; there, only activations are channels-last.
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._compiled = self._mode(model, micro_batch)
        model = synchronise_norms(model, recipe.run.sync_bn, world)
        if self._compiled.mode != "off":
            if self.zero == 3:
                raise RecipeError(
                    f"--compile {self._compiled.mode}: ZeRO 3 cannot be compiled whole; use --zero 0, 1 or 2, or "
                    "--compile off"
                )
            # In place, before wrapping: names, wrappers and checkpoints do not change.
            model.compile(fullgraph=True, mode=None if self._compiled.mode == "default" else self._compiled.mode)
        optim = recipe.optim
        kind = OPTIMIZERS[optim.optimizer]
        optimizer = kind.build(parameter_groups(model, optim.weight_decay), optim.betas, optim.eps)
        self._wrapped, self._optimizer = self._prepare(model, optimizer, micro_batch)
        self.model: nn.Module = self._wrapped.module if self.zero else model
        self._frozen = batch_norms(self.model) if recipe.model.freeze_bn else []
        self._staging: dict[str, Tensor] = {}
        self._masters = Masters(self.zero, self.model, self._optimizer, world, moments=kind.moments, decay=optim.ema)

    @property
    def description(self) -> str:
        """For people: engine and precision."""
        compiled = "" if self._compiled.mode == "off" else f", compiled ({self._compiled.mode})"
        return f"{f'DeepSpeed ZeRO-{self.zero}' if self.zero else 'plain data parallel'}, {self.precision}{compiled}"

    @property
    def picks(self) -> dict[str, str]:
        """What the engine works with, and why where it chose, for people and the log."""
        norms = batch_norms(self.model)
        ranks = {norm.ranks for norm in norms if isinstance(norm, GlobalBatchNorm)}
        over = f"over {ranks.pop()} ranks" if ranks else "per rank" if self.world.size > 1 else "of the whole batch"
        reason = f" ({self._compiled.reason})" if self._compiled.reason else ""
        return {
            "engine": f"{f'DeepSpeed ZeRO-{self.zero}' if self.zero else 'plain data parallel'}, {self.precision}",
            "compile": self._compiled.mode + reason,
            "channels-last": "activations" if self.zero else "weights and activations",
            "optimiser": f"fused {self._recipe.optim.optimizer}",
            "BatchNorm": "frozen" if self._frozen else over,
        }

    @property
    def input_dtype(self) -> torch.dtype:
        """Dtype in which images should come."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def step(self, batches: Sequence[Batch], *, step: int, lr: float) -> StepResult:
        """One optimiser step over this rank's micro-batches; skipped on all ranks if a gradient is not finite.

        Args:
            batches: as many as `accumulation`.
            step: global step number, which (with seed and rank) seeds drop path.
            lr: learning rate of this step.
        """
        torch.manual_seed(seed64(Stream.DROP_PATH, self._recipe.run.seed, step, self.world.rank))
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._wrapped.train()
        for norm in self._frozen:
            norm.eval()
        result = self._deepspeed_step(batches) if self.zero else self._plain_step(batches)
        self._masters.update_average()
        return result

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch | None], *, average: bool = False) -> dict[str, float] | None:
        """Accuracy over all ranks' batches: samples, top1, top5 (shares) and loss. Collective.

        A None among the batches, at the same place on all ranks, breaks it off; the result is None then.

        Args:
            average: evaluate the moving average instead of the present weights.
        """
        self.average_statistics()
        self._wrapped.eval()
        totals = torch.zeros(4, dtype=torch.float64, device=self.world.device)
        with self._masters.averaged() if average else contextlib.nullcontext():
            for batch in batches:
                if batch is None:
                    return None
                with self._autocast():
                    # The bare module: wrappers would add collectives.
                    logits = self.model(batch.images)
                totals += count_correct(logits, batch).sum(dim=0)
        if self.world.size > 1:
            dist.all_reduce(totals)
        samples, top1, top5, loss = totals.tolist()
        return {"samples": int(samples), "top1": top1 / samples, "top5": top5 / samples, "loss": loss / samples}

    def average_statistics(self) -> None:
        """Make BatchNorm's running statistics the mean over ranks; synchronised ones are already. Collective."""
        if self.world.size == 1:
            return
        buffers = [*self.statistics(), *self._masters.averaged_statistics]
        flat = torch.cat([b.flatten() for b in buffers]) / self.world.size
        dist.all_reduce(flat)
        for buffer, part in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
            buffer.copy_(part.view_as(buffer))

    def statistics(self) -> list[Tensor]:
        """BatchNorm's running means and variances, live."""
        return [buffer for buffer in self.model.buffers() if buffer.is_floating_point()]

    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor]:
        """Canonical state (see `launch.masters`), full tensors on the CPU, untouched by training until the next call.

        Collective: every rank must call it; the result is complete on rank 0 and empty elsewhere.
        """
        self.average_statistics()
        state = self._masters.state_dict()
        if not self.world.is_main:
            return {}
        cuda = self.world.device.type == "cuda"
        if not self._staging:  # kept: touching fresh memory costs more than copying
            self._staging = {
                key: torch.empty(value.shape, dtype=value.dtype, pin_memory=cuda) for key, value in state.items()
            }
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # thousands of small copies: waking threads for each takes far longer than copying
        for key, value in state.items():
            self._staging[key].copy_(value, non_blocking=True)
        torch.set_num_threads(threads)
        if cuda:
            torch.cuda.current_stream(self.world.device).synchronize()
        return dict(self._staging)

    def load_state_dict(self, state: dict[str, Tensor], *, steps: int) -> None:
        """Take back what `state_dict` gave, on every rank alike. `steps` optimiser steps lie behind it.

        Raises:
            RecipeError: the state is of another model.
        """
        try:
            self._masters.load_state_dict(state, steps=steps)
        except KeyError as error:
            raise RecipeError(
                f"the checkpoint is of another model: {len(error.args)} names differ, such as "
                f"{error.args[0].split('/')[1]}; use its recipe, or another run folder (--out)"
            ) from None

    def digest(self) -> int:
        """A 63-bit digest of the parameters as this rank holds them, to compare with other ranks'. Reads the device."""
        if self.zero == 3:
            return 0  # no rank holds what another holds
        total = torch.zeros((), dtype=torch.int64, device=self.world.device)
        for number, parameter in enumerate(self._masters.parameters):
            words = parameter.detach().flatten().contiguous().view(torch.int32)
            total = total * 31 + (words.to(torch.int64) * (number + 1)).sum()
        return int(total) & (2**63 - 1)

    # -- plain ---------------------------------------------------------------------------------------------------

    def _plain_step(self, batches: Sequence[Batch]) -> StepResult:
        total = torch.zeros((), device=self.world.device)
        for number, batch in enumerate(batches):
            with self._gradients_stay_here(number < len(batches) - 1):
                with self._autocast():
                    logits = self._wrapped(batch.images)
                loss = soft_cross_entropy(logits, batch, self._recipe.optim.label_smoothing) / len(batches)
                loss.backward()
            total += loss.detach()
        clip = self._recipe.optim.clip_grad or float("inf")
        norm = nn.utils.clip_grad_norm_(self._masters.parameters, clip).detach().float()
        # A fused optimiser leaves everything as it is where this says so, without anybody reading it on the host.
        self._optimizer.grad_scale, self._optimizer.found_inf = None, norm.isfinite().logical_not().float()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return StepResult(total, norm)

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
            self._wrapped.step()  # skips the update where the norm is not finite
            total += loss.detach() / len(batches)
        norm = torch.as_tensor(self._wrapped.get_global_grad_norm(), dtype=torch.float32, device=self.world.device)
        return StepResult(total, norm)

    def _deepspeed_config(self, micro_batch: int) -> dict[str, Any]:
        """launch/zero/zeroN.json, and what only the run knows."""
        path = Path(__file__).with_name("zero") / f"zero{self.zero}.json"
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        config["train_micro_batch_size_per_gpu"] = micro_batch
        config["gradient_accumulation_steps"] = self._accumulation
        config["gradient_clipping"] = self._recipe.optim.clip_grad
        config["torch_autocast"]["enabled"] = self.precision == "bf16"
        config["zero_optimization"]["overlap_comm"] &= self.world.device.type == "cuda"
        return config

    # -- wrapping ------------------------------------------------------------------------------------------------

    def _mode(self, model: nn.Module, micro_batch: int) -> Choice:
        """The recipe's torch.compile mode, or the fastest."""
        wish = self._recipe.run.compile
        if wish in {"reduce-overhead", "max-autotune"} and self._accumulation > 1 and self.world.device.type == "cuda":
            raise RecipeError(
                f"--compile {wish}: CUDA graphs would overwrite gradients that {self._accumulation} micro-batches add "
                "up; use --compile default, or a --micro-batch that is the whole batch of a rank"
            )
        if wish != "auto":
            return Choice(wish, "")
        side, device, dtype = self._recipe.data.size, self.world.device, self.input_dtype
        return choose_mode(
            model,
            self.world,
            images=lambda: torch.randn(micro_batch, 3, side, side, device=device, dtype=dtype),
            bf16=self.precision == "bf16",
            whole=self.zero != 3,
            graphs=self._accumulation == 1,
        )

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

        # DeepSpeed before 0.19.8 looks for nvcc when it is imported, though nothing of ours needs it.
        os.environ.setdefault("DS_IGNORE_CUDA_DETECTION", "1")
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
        return (wrapped, wrapped.optimizer) if self.zero else (wrapped, optimizer)

    def _check_agreement(self, accelerator: Any) -> None:
        """The traps of launching end here: ranks that each believe to be alone would train apart without a word."""
        kind, seen = accelerator.distributed_type.value, accelerator.num_processes
        joined = dist.get_world_size() if dist.is_initialized() else 1
        if joined != self.world.size or seen != self.world.size or (kind == "NO" and self.world.size > 1):
            raise RecipeError(
                f"WORLD_SIZE is {self.world.size}, torch.distributed sees {joined}, accelerate {seen} processes of "
                f"type {kind}: the ranks would not train together; launch with 'accelerate launch --multi_gpu "
                "--num_processes N launch/train.py ...' (on CPUs too)"
            )
        if bool(self.zero) != (kind == "DEEPSPEED"):
            raise RecipeError(
                f"--zero {self.zero} asked for, but accelerate chose {kind}; do not set ACCELERATE_USE_DEEPSPEED or a "
                "DeepSpeed configuration in the launcher: the recipe decides"
            )

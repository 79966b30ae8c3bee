"""The engine: runs training steps and evaluations, on one process or several, with DDP or DeepSpeed's ZeRO.

Related files: `launch/engine/execution.py` (how the model is executed), `launch/engine/accelerate.py` (wrapping),
`launch/optim/zero_state.py` (access to DeepSpeed's state).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fat.kernels
from launch.config.errors import RecipeError
from launch.config.recipe import Recipe
from launch.engine.accelerate import wrap
from launch.engine.cuda_graph_capture import RECORDERS
from launch.engine.cuda_graphs import GraphedModel
from launch.engine.distillation import Distiller, Teacher
from launch.engine.execution import (
    COMPILER_GRAPHS,
    Execution,
    capture_on_all_ranks,
    compile_passes,
    zero_and_precision,
)
from launch.engine.input_shapes import DropPathRates, InputShape
from launch.engine.loss import SampleResults, autocast, evaluate_batches, training_loss
from launch.engine.recalibration import recalibrate
from launch.engine.sync_batchnorm import GlobalBatchNorm, batch_norms, convert_sync_batchnorm
from launch.machine.world import World
from launch.optim.fine_tuning import backbone_modules, freeze_backbone, set_grad_checkpointing
from launch.optim.optimizers import OPTIMIZERS, Updater, parameter_groups
from launch.optim.zero_state import OptimizerState
from launch.stragglers.collective_wait import CollectiveWait, measure_deepspeed
from pipeline.loader import Batch
from pipeline.rng import Stream, seed64


@dataclass(frozen=True)
class StepResult:
    """Results of a step, on the device. Reading them waits for the step to finish.

    With ZeRO 3, and with ZeRO 1 and 2 if the optimizer is not fused, the host has already waited for the norm.
    """

    loss: Tensor
    """float32 scalar: mean loss over this rank's rows."""
    grad_norm: Tensor
    """float32 scalar: global gradient norm before clipping, equal on all ranks. The update was skipped if
    it is not finite."""


class Engine:
    """A model in training, with its optimizer and EMA.

    Args:
        model: on the CPU; it is moved to the device and wrapped.
        recipe: optimizer, precision, ZeRO stage, BatchNorm, execution.
        world: from `connect`.
        shapes: the shapes of this rank's batches, in order of use; a shape may occur several times.
        teacher: model whose outputs are distilled (`Recipe.distillation`); None: no distillation.

    The constructor captures forward and backward for every shape as CUDA graphs, or compiles them, so that no step
    waits for it. With CUDA graphs, every batch must have one of these shapes.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        world: World,
        *,
        shapes: Sequence[InputShape],
        teacher: Teacher | None = None,
    ) -> None:
        self.world = world
        # Weight gradients of 1x1 convolutions are sums over all pixels of a batch; bf16 partial sums are too inexact.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        self.zero, self.precision = zero_and_precision(recipe.parallel, world.device, ranks=world.size)
        # The largest images first: see `GraphedModel.capture`.
        self._shapes = sorted(dict.fromkeys(shapes), key=lambda shape: shape.rows * shape.size**2, reverse=True)
        accumulation = max(shape.accumulation for shape in shapes)
        self.execution = Execution.of(recipe, world.device, accumulation=accumulation, ranks=world.size)
        self._recipe = recipe
        if recipe.model.freeze_backbone:
            freeze_backbone(model)
        if recipe.compile.grad_checkpointing:
            set_grad_checkpointing(model)
        self.teacher = teacher
        distillation = recipe.distillation
        self._distiller = Distiller(teacher, distillation, world.device, self.precision) if teacher else None
        model = self.execution.apply_memory_format(model.to(world.device))
        model = convert_sync_batchnorm(model, recipe.parallel.sync_bn, world)
        self.execution.compile_model(model, shapes=len(self._shapes))
        self._drop_path = DropPathRates(model, shapes)
        # GraphedModel replaces `model.forward`, so it is created before DDP or DeepSpeed wraps the model.
        graphed = self.execution.compile == "cudagraphs"
        # Static gradients are invalid with DDP, DeepSpeed or gradient accumulation.
        keeps = not self.zero and world.size == 1 and accumulation == 1
        recorder = RECORDERS[world.device.type](world.device) if graphed else None
        self._graphs = GraphedModel(model, recorder, keeps_gradients=keeps) if recorder else None
        optim = recipe.optim
        spec = OPTIMIZERS[optim.optimizer]
        groups = parameter_groups(model, optim)
        optimizer = spec.build(groups, optim, self.execution.optimizer_impl)
        self._wrapped, self._optimizer = wrap(
            model,
            optimizer,
            world,
            zero=self.zero,
            bf16=self.precision == "bf16",
            clip_grad=optim.clip_grad,
        )
        self.model: nn.Module = self._wrapped.module if self.zero else model
        # Modules in eval mode during training.
        self._frozen: list[nn.Module] = [*batch_norms(self.model)] if recipe.model.freeze_bn else []
        if recipe.model.freeze_backbone:
            self._frozen = list(backbone_modules(self.model))
        # Without this, the first `_set_training_mode` would return early and not set the mode of frozen layers.
        self._wrapped.eval()
        self._staging: dict[str, Tensor] = {}
        self._state = OptimizerState(self.zero, self.model, self._optimizer, world, spec=spec, decay=optim.ema)
        self._update = None if self.zero else Updater(self._optimizer, self._state.parameters, spec)
        # DeepSpeed's clipping would make the host wait for the device (see `wrap`).
        self._clips = self.zero in (1, 2) and self.execution.optimizer_impl == "fused"
        self.notes: list[str] = [self._drop_path.note] if self._drop_path.note else []
        """Messages for the log about the setup of the engine."""
        self.phase: Callable[[str], AbstractContextManager[object]] = contextlib.nullcontext
        """Returns the context of each "forward", "backward" and "optimizer" phase of a step, by its name."""
        self._set_training_mode()
        with fat.kernels.use(self.execution.kernels):
            if self._graphs is not None:
                self._capture(self._graphs)
            elif self.execution.uses_compiler:
                self._compile()
        self.collective_wait = CollectiveWait(world.device, incomplete=self._has_unmeasured_collectives())
        """Measures how long the collectives of the steps take."""

    @property
    def input_dtype(self) -> torch.dtype:
        """Dtype of the images that `step` expects."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def step(self, batches: Sequence[Batch], *, step: int, lr: float) -> StepResult:
        """Run one optimizer step on this rank's micro-batches. All ranks skip the update if a gradient is not finite.

        Args:
            batches: micro-batches of one shape. Their number may differ from that of other steps.
            step: global step number. With seed and rank, it seeds drop path.
            lr: learning rate of this step, before the factors of `parameter_groups`.
        """
        # A replay of a CUDA graph reads the generator's seed and offset, so that it draws new random numbers too.
        seed_generators(self.world.device, seed64(Stream.DROP_PATH, self._recipe.run.seed, step, self.world.rank))
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self._set_training_mode()
        self._drop_path.scale_for(len(batches[0].images), batches[0].images.shape[-1])
        measured = self.collective_wait.step() if self.world.size > 1 else contextlib.nullcontext()
        with fat.kernels.use(self.execution.kernels), measured:
            result = self._plain_step(batches, self._update) if self._update else self._deepspeed_step(batches)
            with self.phase("optimizer"):
                self._state.update_average(step)
        return result

    def _plain_step(self, batches: Sequence[Batch], update: Updater) -> StepResult:
        total = torch.zeros((), device=self.world.device)
        for number, batch in enumerate(batches):
            # DDP reduces gradients only in the last micro-batch.
            several = self.world.size > 1
            local = several and number < len(batches) - 1
            with self._wrapped.no_sync() if local else contextlib.nullcontext():
                with self.phase("forward"):
                    with autocast(self.world.device, self.precision):
                        logits = self._wrapped(batch.images)
                    loss = self._loss(logits, batch) / len(batches)
                reduces = self.collective_wait.backward(loss) if several and not local else contextlib.nullcontext()
                with self.phase("backward"), reduces:
                    loss.backward()
            total += loss.detach()
        with self.phase("optimizer"):
            norm = update(self._recipe.optim.clip_grad)
            if not (self._graphs and self._graphs.keeps_gradients):
                self._optimizer.zero_grad(set_to_none=True)
        return StepResult(total, norm)

    def _has_unmeasured_collectives(self) -> bool:
        """Return whether steps have collectives that `CollectiveWait` cannot measure."""
        if self.world.size == 1:
            return False
        if self.zero and (not measure_deepspeed() or self.zero == 3):
            return True
        synchronized = any(isinstance(norm, GlobalBatchNorm) and norm.training for norm in batch_norms(self.model))
        return synchronized and self.execution.compile != "off"

    def _deepspeed_step(self, batches: Sequence[Batch]) -> StepResult:
        total, norm = torch.zeros((), device=self.world.device), None
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            self._wrapped.set_gradient_accumulation_boundary(last)
            with self.phase("forward"):
                loss = self._loss(self._wrapped(batch.images), batch) / len(batches)
            with self.phase("backward"):
                self._wrapped.backward(loss)
            with self.phase("optimizer"):
                if last and self._clips:
                    norm = self._state.clip_gradients(self._recipe.optim.clip_grad)
                self._wrapped.step()
            total += loss.detach()
        if norm is None:  # DeepSpeed has computed the norm, and skipped the update if the norm is not finite
            norm = torch.as_tensor(self._wrapped.get_global_grad_norm(), dtype=torch.float32, device=self.world.device)
        return StepResult(total, norm)

    def _loss(self, logits: Tensor, batch: Batch) -> Tensor:
        loss = training_loss(logits, batch, self._recipe.optim)
        return self._distiller(loss, logits, batch.images) if self._distiller else loss

    def _set_training_mode(self) -> None:
        if self.model.training:  # do not set the mode again: it takes 1 to 2 ms of host time
            return
        self._wrapped.train()
        for module in self._frozen:
            module.eval()

    @torch.no_grad()
    def evaluate(
        self, batches: Iterable[Batch], *, average: bool = False, samples: SampleResults | None = None
    ) -> dict[str, float]:
        """Return samples, top1, top5 (fractions) and loss over the batches of all ranks. Collective.

        Args:
            average: evaluate the EMA instead of the current weights.
            samples: collects the predictions of this rank's samples.
        """
        self.average_statistics()
        self._wrapped.eval()
        totals = torch.zeros(4, dtype=torch.float64, device=self.world.device)
        with self._state.averaged() if average else contextlib.nullcontext(), fat.kernels.use(self.execution.kernels):
            for result in evaluate_batches(
                self._eager_forward, batches, device=self.world.device, precision=self.precision, samples=samples
            ):
                totals += result.counts.sum(dim=0)
        if self.world.size > 1:
            dist.all_reduce(totals)
        count, top1, top5, loss = totals.tolist()
        return {"samples": int(count), "top1": top1 / count, "top5": top5 / count, "loss": loss / count}

    def recalibrate_batch_norm(self, batches: Iterable[Batch], *, average: bool = False) -> None:
        """Replace BatchNorm's running statistics by their averages over training batches. Collective.

        Every rank passes its part of the same batches, and the results are averaged over ranks. Frozen layers keep
        their statistics. See `launch.engine.recalibration`.

        Args:
            average: recalibrate the EMA instead of the current weights.
        """
        self._set_training_mode()
        norms = [norm for norm in batch_norms(self.model) if norm.training and norm.running_mean is not None]
        self._wrapped.eval()
        forward = self._eager_forward

        def run(images: Tensor) -> None:
            with autocast(self.world.device, self.precision):
                forward(images)

        with self._state.averaged() if average else contextlib.nullcontext(), fat.kernels.use(self.execution.kernels):
            recalibrate(norms, run, (batch.images for batch in batches))
        self._wrapped.eval()
        self.average_statistics()

    @property
    def _eager_forward(self) -> Callable[[Tensor], Tensor]:
        """Forward pass of the unwrapped module, because wrappers would add collectives, which is eager even if training
        is compiled, because compiling again for evaluation would take minutes."""
        forward: Callable[[Tensor], Tensor] = self.model.forward if self.execution.uses_compiler else self.model
        return forward

    def average_statistics(self) -> None:
        """Average BatchNorm's running statistics over ranks (synchronized ones are equal already). Collective."""
        if self.world.size == 1:
            return
        buffers = [*self.statistics(), *self._state.averaged_statistics]
        flat = torch.cat([b.flatten() for b in buffers]) / self.world.size
        dist.all_reduce(flat)
        for buffer, part in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
            buffer.copy_(part.view_as(buffer))

    def statistics(self) -> list[Tensor]:
        """Return BatchNorm's running means and variances (not copies)."""
        return self._state.statistics

    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor]:
        """Return the canonical state (see `launch.optim.zero_state`) as full tensors on the CPU. Collective.

        Rank 0 gets the state, other ranks an empty one. Training does not change the tensors, but the next call
        overwrites them.
        """
        self.average_statistics()
        state = self._state.state_dict()
        if not self.world.is_main:
            return {}
        cuda = self.world.device.type == "cuda"
        if not self._staging:  # allocated only once, because page faults of new memory take longer than the copy
            self._staging = {
                key: torch.empty(value.shape, dtype=value.dtype, pin_memory=cuda) for key, value in state.items()
            }
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # waking threads for each of thousands of small copies takes longer than the copies
        for key, value in state.items():
            self._staging[key].copy_(value, non_blocking=True)
        torch.set_num_threads(threads)
        if cuda:
            torch.cuda.current_stream(self.world.device).synchronize()
        return dict(self._staging)

    def load_state_dict(self, state: dict[str, Tensor], *, steps: int) -> None:
        """Load a `state_dict`. Collective: every rank passes the same state.

        Args:
            steps: number of optimizer steps after which the state was saved.

        Raises:
            RecipeError: the state belongs to another model.
        """
        try:
            self._state.load_state_dict(state, steps=steps)
        except ValueError as error:
            raise RecipeError(
                f"the checkpoint belongs to another model: {error}; use its recipe, or another run folder (--out)"
            ) from None

    def close(self) -> None:
        """Remove DeepSpeed's hooks, which would keep the model in memory when this process builds another engine."""
        if self.zero:
            self._wrapped.destroy()

    def digest(self) -> int:
        """Return a 63-bit digest of this rank's parameters, to compare with that of other ranks. Waits for the device.

        With ZeRO 3, whose ranks have different parts of the parameters, it is 0.
        """
        if self.zero == 3:
            return 0
        total = torch.zeros((), dtype=torch.int64, device=self.world.device)
        for number, parameter in enumerate(self._state.parameters):
            words = parameter.detach().flatten().contiguous().view(torch.int32)
            total = total * 31 + (words.to(torch.int64) * (number + 1)).sum()
        return int(total) & (2**63 - 1)

    @property
    def description(self) -> str:
        """Data parallelism and precision, for messages."""
        return f"{f'DeepSpeed ZeRO-{self.zero}' if self.zero else 'plain data parallel'}, {self.precision}"

    @property
    def resolved(self) -> dict[str, str]:
        """Names and chosen values of execution options, for the log."""
        norms = batch_norms(self.model)
        ranks = {norm.ranks for norm in norms if isinstance(norm, GlobalBatchNorm)}
        over = f"over {ranks.pop()} ranks" if ranks else "per rank" if self.world.size > 1 else "of the whole batch"
        over = over if norms else "none in this model"
        execution, device, optim = self.execution, self.world.device.type, self._recipe.optim
        detail = f": forward and backward of {self._graphs.parts} parts" if self._graphs else ""
        detail = f" ({execution.eager_reason})" if execution.eager_reason else detail
        return {
            "engine": self.description,
            "compile": execution.compile + detail,
            "channels-last": "activations" if execution.memory_format == "contiguous" else "weights and activations",
            "kernels": "PyTorch" if execution.kernels == "off" or not fat.kernels.supported(device) else "Triton",
            "optimizer": f"{execution.optimizer_impl} {optim.optimizer}",
            "schedule": f"{optim.resolved_schedule}, {optim.warmup:g} epochs of warm-up",
            "BatchNorm": "frozen" if self._frozen else over,
        }

    def _examples(self) -> Iterator[Tensor]:
        """Yield random images of every shape, after setting its drop-path rates."""
        device = self.world.device
        for rows, size in dict.fromkeys((shape.rows, shape.size) for shape in self._shapes):
            self._drop_path.scale_for(rows, size)
            generator = torch.Generator(device).manual_seed(0)
            images = torch.randn((rows, 3, size, size), generator=generator, device=device).to(self.input_dtype)
            yield images.contiguous(memory_format=torch.channels_last)

    def _compile(self) -> None:
        """Compile the training passes of every shape with torch.compile. Collective."""

        def forward(images: Tensor) -> Tensor:
            # Through DDP, because the compiler splits the code where DDP reduces gradients.
            local = self._wrapped.no_sync() if self.world.size > 1 and not self.zero else contextlib.nullcontext()
            with local, autocast(self.world.device, self.precision):
                logits: Tensor = (self.model if self.zero else self._wrapped)(images)
            return logits

        compile_passes(forward, self.model, self._examples(), uses_graphs=self.execution.compile in COMPILER_GRAPHS)

    def _capture(self, graphs: GraphedModel) -> None:
        """Capture the training passes as CUDA graphs; if that fails on a rank, all ranks train eagerly. Collective."""
        cast_to = torch.bfloat16 if self.precision == "bf16" else None
        reason = capture_on_all_ranks(graphs, self._examples, cast_to, self.world)
        if reason:
            self._graphs = None
            self.execution = replace(self.execution, compile="off", eager_reason=f"capture failed: {reason}")
            self.notes.append(
                f"warning: CUDA graph capture failed ({reason}); training continues eagerly, without graphs"
            )


def seed_generators(device: torch.device, value: int) -> None:
    """Seed the CPU's generator and, for a CUDA device, that of the current device, which `connect` has set.

    `torch.manual_seed` is slower: it also seeds all other device types, and for each type that is not available it
    formats a stack trace.
    """
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        torch.cuda.manual_seed(value)

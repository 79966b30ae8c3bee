"""How a model is executed. These choices affect its speed, and its results only by rounding."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fat.kernels
from fat.model import FAT
from launch.config.engine import MemoryFormat, OptimizerImpl, ParallelConfig
from launch.config.errors import RecipeError
from launch.config.recipe import Recipe
from launch.engine.cuda_graph_capture import RECORDERS, WARM_UP
from launch.engine.cuda_graphs import GraphedModel, preserve_state
from launch.engine.sync_batchnorm import syncs_over_ranks
from launch.machine.world import World
from launch.optim.optimizers import OPTIMIZERS
from shards.errors import UserError, first_line
from shards.files.private_folder import create_private_folder
from shards.files.temporary import temporary_folder
from shards.ownership import user_name

KernelMode = fat.kernels.Mode
Mode = Literal["off", "cudagraphs", "default", "reduce-overhead", "max-autotune"]

KERNELS_VARIABLE = "FAT_KERNELS"
FORMATS = {"channels-last": torch.channels_last, "contiguous": torch.contiguous_format}
RECOMPILE_LIMIT = 8  # of torch._dynamo: more compilations of a function for one shape are probably a mistake
COMPILER_GRAPHS = ("reduce-overhead", "max-autotune")  # modes of torch.compile that use CUDA graphs


def zero_and_precision(
    parallel: ParallelConfig, device: torch.device, *, ranks: int
) -> tuple[Literal[0, 1, 2, 3], Literal["bf16", "fp32"]]:
    """Return the ZeRO stage and the precision for `ranks` processes with devices of this type."""
    cuda = device.type == "cuda"
    zero = (1 if cuda and ranks > 1 else 0) if parallel.zero == "auto" else parallel.zero
    precision = ("bf16" if cuda else "fp32") if parallel.precision == "auto" else parallel.precision
    return zero, precision


@dataclass(frozen=True, kw_only=True)
class Execution:
    """Resolved execution options of a model (see `launch.config.engine.CompileConfig`)."""

    memory_format: MemoryFormat
    """Memory format of the weights."""
    kernels: KernelMode
    """Whether Triton kernels are used; "unchecked" skips their self-check."""
    compile: Mode
    optimizer_impl: OptimizerImpl
    eager_reason: str = ""
    """Reason for eager execution on a GPU, where CUDA graphs are the default; empty if there is none."""

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        device: torch.device,
        *,
        accumulation: int,
        ranks: int,
    ) -> Execution:
        """Resolve the recipe's options; unset options get their defaults.

        Args:
            accumulation: micro-batches per step; the largest number if it changes.
            ranks: world size of the training.

        Raises:
            RecipeError: the options cannot be combined.
        """
        options = recipe.compile
        zero, _ = zero_and_precision(recipe.parallel, device, ranks=ranks)
        obstacle = graph_obstacle(recipe, device, ranks=ranks)
        mode: Mode = options.compile or ("off" if obstacle else "cudagraphs")
        if mode == "cudagraphs" and obstacle:
            raise RecipeError(f"--compile cudagraphs: {obstacle}; use --compile off")
        if zero and options.memory_format == "channels-last":
            raise RecipeError(
                f"--memory-format channels-last: DeepSpeed (ZeRO stage {zero}) supports only contiguous weights; use "
                "--zero 0, or --memory-format contiguous: images are channels-last in either case"
            )
        if zero == 3 and mode not in ("off", "cudagraphs"):
            raise RecipeError(
                f"--compile {mode}: torch.compile does not support ZeRO 3; use --zero 0, 1 or 2, or --compile off"
            )
        if recipe.compile.grad_checkpointing and mode in COMPILER_GRAPHS:
            raise RecipeError(
                f"--compile {mode}: its CUDA graphs contradict --grad-checkpointing; use --compile default or off"
            )
        optimizer = recipe.optim.optimizer
        if zero and not OPTIMIZERS[optimizer].partitions:
            raise RecipeError(
                f"--optimizer {optimizer}: needs the norms of whole weight tensors, which ZeRO (stage {zero}) "
                "partitions; use --zero 0, or another optimizer"
            )
        if optimizer == "lamb" and options.optimizer_impl == "foreach":
            raise RecipeError("--optimizer-impl foreach: LAMB has only the fused implementation; omit the option")
        if zero == 3 and recipe.model.freeze_backbone:
            raise RecipeError("--freeze-backbone: does not support ZeRO 3; use --zero 0, 1 or 2")
        if mode in COMPILER_GRAPHS and accumulation > 1 and device.type == "cuda":
            raise RecipeError(
                f"--compile {mode}: its CUDA graphs would overwrite the gradients that {accumulation} micro-batches "
                "accumulate; use --compile cudagraphs or default, or a --micro-batch of all images of a rank"
            )
        return cls(
            memory_format=options.memory_format or ("contiguous" if zero else "channels-last"),
            kernels=(options.kernels or fat.kernels.mode()) if recipe.model.spec.is_fat else "off",
            compile=mode,
            optimizer_impl=options.optimizer_impl or "fused",
            eager_reason=obstacle if options.compile is None and device.type in RECORDERS else "",
        )

    def apply_memory_format(self, model: nn.Module) -> nn.Module:
        """Convert the model's weights to this memory format, in place; return the model."""
        return model.to(memory_format=FORMATS[self.memory_format])  # type: ignore[call-overload]

    def compile_model(self, model: nn.Module, *, shapes: int) -> None:
        """Compile the model in place, before it is wrapped, so that names and checkpoints do not change.

        Args:
            shapes: number of shapes of images for which it will be compiled.
        """
        if self.uses_compiler:
            _check_compiler_cache()
            # FAT is one graph. Other models may have graph breaks.
            whole = isinstance(model, FAT)
            # Code for each shape: code for variable sizes is slower, and its compilation would be a surprise in a step.
            model.compile(fullgraph=whole, dynamic=False, mode=None if self.compile == "default" else self.compile)
            config = torch._dynamo.config
            config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT * shapes)

    @property
    def uses_compiler(self) -> bool:
        """Whether the model is compiled with torch.compile."""
        return self.compile not in ("off", "cudagraphs")


def _check_compiler_cache() -> None:
    """Check that no other user could have put code into the cache folder of torch.compile.

    By default the folder has a predictable name in the temporary folder, and PyTorch uses an existing one unchecked.

    Raises:
        UserError: the folder belongs to another user, or everybody may write to it.
    """
    name = "TORCHINDUCTOR_CACHE_DIR"
    default = temporary_folder() / f"torchinductor_{user_name(os.geteuid()).removeprefix('user ')}"
    folder = Path(os.environ.setdefault(name, str(default)))
    remedy = f"set {name} to a folder that belongs to you"
    try:
        create_private_folder(folder, remedy=remedy, group=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be used ({error.strerror}); {remedy}") from error


def graph_obstacle(recipe: Recipe, device: torch.device, *, ranks: int) -> str:
    """Return why the training passes cannot be captured as CUDA graphs, or an empty string. Call `connect` before."""
    zero, _ = zero_and_precision(recipe.parallel, device, ranks=ranks)
    if device.type not in RECORDERS:
        return f"requires a CUDA device, but this one is {device.type}"
    if zero == 3:
        return "ZeRO 3 gathers weights in hooks, which a CUDA graph does not call"
    if recipe.compile.grad_checkpointing:
        return "--grad-checkpointing runs blocks again in the backward pass, in hooks which a CUDA graph does not call"
    synchronized = syncs_over_ranks(recipe.parallel.sync_bn, ranks, device) and not recipe.model.frozen_norms
    # `pipeline tune --ranks N` simulates several ranks in one process, without a process group.
    if synchronized and dist.is_initialized() and dist.get_backend() != "nccl":
        return f"synchronized BatchNorm uses {dist.get_backend()}, but only collectives of NCCL can be captured"
    return ""


def capture_on_all_ranks(
    graphs: GraphedModel, examples: Callable[[], Iterable[Tensor]], autocast: torch.dtype | None, world: World
) -> str:
    """Capture the training passes on all ranks, or on none if a capture fails; return its error, or an empty string.

    Collective.

    Args:
        examples: yields images of every shape, after setting what the passes with this shape depend on.
        autocast: see `GraphedModel.warm_up`.
    """
    # Errors of the warm-up are not caught: they would also occur in training, and other ranks may be in a collective.
    for images in examples():
        graphs.warm_up(images, autocast)
    failure = ""
    try:
        for images in examples():
            graphs.capture(images, autocast)
    except Exception as error:
        failure = f"{type(error).__name__}: {first_line(error)}"
    failures = [f"rank {rank}: {reason}" for rank, reason in enumerate(world.gather(failure)) if reason]
    if not failures:
        return ""
    graphs.discard()
    return failures[0] if world.size > 1 else failure


def compile_passes(
    forward: Callable[[Tensor], Tensor], model: nn.Module, examples: Iterable[Tensor], *, uses_graphs: bool
) -> None:
    """Compile forward and backward of a model with `compile_model` for every shape, by running both.

    Gradients, buffers and random generators do not change. Collective if the model contains collectives.

    Args:
        forward: the training step's forward pass, without DDP's reduction of gradients.
        examples: see `capture_on_all_ranks`.
        uses_graphs: the compiler captures CUDA graphs, for which it needs further passes.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for images in examples:
        with preserve_state(model, images.device):
            for _ in range(WARM_UP if uses_graphs else 1):
                logits = forward(images)
                # No `backward()`, which would accumulate gradients and call the hooks of DeepSpeed.
                torch.autograd.grad(logits, parameters, torch.ones_like(logits), allow_unused=True)


@contextmanager
def kernels_from_environment() -> Iterator[None]:
    """Run a command with the kernel mode of the environment variable FAT_KERNELS; "auto" if it is not set.

    Raises:
        RecipeError: the variable has an unknown value.
    """
    value = os.environ.get(KERNELS_VARIABLE, "auto")
    if value not in fat.kernels.MODES:
        raise RecipeError(f"{KERNELS_VARIABLE}={value}: expected {', '.join(fat.kernels.MODES[:-1])} or unchecked")
    with fat.kernels.use(value):
        yield

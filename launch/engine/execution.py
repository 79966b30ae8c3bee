"""How a model is run: what changes its speed, and last bits of its results, but nothing else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn

import fat.kernels
from launch.config.engine import MemoryFormat, OptimizerImpl, ParallelConfig
from launch.config.errors import RecipeError
from launch.config.recipe import Recipe
from launch.engine.cuda_graph_capture import RECORDERS
from launch.engine.cuda_graphs import GraphedModel
from launch.engine.sync_batchnorm import over_ranks
from launch.machine.world import World
from shards.errors import UserError, first_line
from shards.files.private_folder import create_private_folder
from shards.files.temporary import temporary_folder
from shards.ownership import user_name

Switch = fat.kernels.Mode
Mode = Literal["off", "cudagraphs", "default", "reduce-overhead", "max-autotune"]

KERNELS_VARIABLE = "FAT_KERNELS"
FORMATS = {"channels-last": torch.channels_last, "contiguous": torch.contiguous_format}
GRAPHS = ("reduce-overhead", "max-autotune")  # of the compiler: neither with accumulation nor unasked on several ranks


def zero_and_precision(
    parallel: ParallelConfig, device: torch.device, *, ranks: int
) -> tuple[Literal[0, 1, 2, 3], Literal["bf16", "fp32"]]:
    """Return the ZeRO stage and the precision on `ranks` processes with such a device.

    ZeRO `auto` is 1 on several GPUs and 0 elsewhere: one process has nothing to shard.
    """
    cuda = device.type == "cuda"
    zero = (1 if cuda and ranks > 1 else 0) if parallel.zero == "auto" else parallel.zero
    precision = ("bf16" if cuda else "fp32") if parallel.precision == "auto" else parallel.precision
    return zero, precision


@dataclass(frozen=True, kw_only=True)
class Execution:
    """One way to run a model."""

    memory_format: MemoryFormat
    """Of the weights."""
    kernels: Switch
    """FAT's own kernels; "unchecked" = without comparing them with torch first."""
    compile: Mode
    optimizer_impl: OptimizerImpl
    eager_because: str = ""
    """Why the default, CUDA graphs, does not apply on this GPU."""

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        device: torch.device,
        *,
        accumulation: int,
        ranks: int,
    ) -> Execution:
        """Resolve the recipe's options, with defaults where they are left open.

        Args:
            accumulation: micro-batches per step.
            ranks: world size of the training.

        Raises:
            RecipeError: the options cannot be combined.
        """
        wanted = recipe.compile
        zero, _ = zero_and_precision(recipe.parallel, device, ranks=ranks)
        obstacle = graph_obstacle(recipe, device, ranks=ranks)
        mode: Mode = wanted.compile or ("off" if obstacle else "cudagraphs")
        if mode == "cudagraphs" and obstacle:
            raise RecipeError(f"--compile cudagraphs: {obstacle}; use --compile off")
        if zero and wanted.memory_format == "channels-last":
            raise RecipeError(
                f"--memory-format channels-last: DeepSpeed cannot hold such weights (ZeRO stage {zero}); use --zero 0, "
                "or --memory-format contiguous: images are channels-last either way"
            )
        if zero == 3 and mode not in ("off", "cudagraphs"):
            raise RecipeError(
                f"--compile {mode}: ZeRO 3 cannot be compiled whole; use --zero 0, 1 or 2, or --compile off"
            )
        if mode in GRAPHS and accumulation > 1 and device.type == "cuda":
            raise RecipeError(
                f"--compile {mode}: its CUDA graphs would overwrite gradients that {accumulation} micro-batches add "
                "up; use --compile cudagraphs or default, or a --micro-batch that is the whole batch of a rank"
            )
        return cls(
            memory_format=wanted.memory_format or ("contiguous" if zero else "channels-last"),
            kernels=wanted.kernels or fat.kernels.mode(),
            compile=mode,
            optimizer_impl=wanted.optimizer_impl or "fused",
            eager_because=obstacle if wanted.compile is None and device.type in RECORDERS else "",
        )

    def apply_memory_format(self, model: nn.Module) -> nn.Module:
        """The model with its weights in this memory format, in place."""
        return model.to(memory_format=FORMATS[self.memory_format])  # type: ignore[call-overload]

    def compile_model(self, model: nn.Module) -> None:
        """In place, before wrapping: names, wrappers and checkpoints do not change."""
        if self.uses_compiler:
            _check_compiler_cache()
            model.compile(fullgraph=True, mode=None if self.compile == "default" else self.compile)

    @property
    def uses_compiler(self) -> bool:
        """Whether torch.compile is used."""
        return self.compile not in ("off", "cudagraphs")


def _check_compiler_cache() -> None:
    """Refuse to run code that another user may have put where torch.compile keeps its own.

    By default that is a folder of a known name in the temporary folder, which torch uses as it finds it.

    Raises:
        UserError: the folder is another user's, or everybody may write to it.
    """
    name = "TORCHINDUCTOR_CACHE_DIR"
    default = temporary_folder() / f"torchinductor_{user_name(os.geteuid()).removeprefix('user ')}"
    folder = Path(os.environ.setdefault(name, str(default)))
    remedy = f"set {name} to a folder of your own"
    try:
        create_private_folder(folder, remedy=remedy, group=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be used ({error.strerror}); {remedy}") from error


def graph_obstacle(recipe: Recipe, device: torch.device, *, ranks: int) -> str:
    """Return why the training passes cannot be captured as CUDA graphs; empty where they can. After `connect`."""
    zero, _ = zero_and_precision(recipe.parallel, device, ranks=ranks)
    if device.type not in RECORDERS:
        return f"needs a CUDA device, and this is {device.type}"
    if zero == 3:
        return "ZeRO 3 gathers weights in hooks, which a CUDA graph does not call"
    synchronised = over_ranks(recipe.parallel.sync_bn, ranks, device) and not recipe.model.freeze_bn
    # `pipeline tune --ranks N` asks for several ranks in one process, without a process group.
    if synchronised and dist.is_initialized() and dist.get_backend() != "nccl":
        return f"BatchNorm's collectives over ranks go by {dist.get_backend()}, and only NCCL's can be captured"
    return ""


def capture_on_all_ranks(graphs: GraphedModel, images: torch.Tensor, autocast: torch.dtype | None, world: World) -> str:
    """Capture the training passes on all ranks, or on none if a rank cannot; returns why not. Collective.

    For the arguments see `GraphedModel.warm_up`.
    """
    # Not caught: what fails eagerly fails in training too, and other ranks wait in BatchNorm's collectives.
    graphs.warm_up(images, autocast)
    failure = ""
    try:
        graphs.capture(images, autocast)
    except Exception as error:
        failure = f"{type(error).__name__}: {first_line(error)}"
    failures = [f"rank {rank}: {reason}" for rank, reason in enumerate(world.gather(failure)) if reason]
    if not failures:
        return ""
    graphs.discard()
    return failures[0] if world.size > 1 else failure


@contextmanager
def kernels_from_environment() -> Iterator[None]:
    """Run a command in the kernels' mode that the variable FAT_KERNELS names, "auto" where it is not set.

    Raises:
        RecipeError: a value that does not exist.
    """
    value = os.environ.get(KERNELS_VARIABLE, "auto")
    if value not in fat.kernels.MODES:
        raise RecipeError(f"{KERNELS_VARIABLE}={value}: expected {', '.join(fat.kernels.MODES[:-1])} or unchecked")
    with fat.kernels.use(value):
        yield

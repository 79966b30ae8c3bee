"""The recipe: everything that decides what a run computes, as frozen dataclasses with a docstring per field.

The docstrings are the command line's help (`launch.config.command_line`); `b0()` .. `b3()` are the paper's recipes.
Numbers are the released code's unless a docstring says otherwise.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Interval

from launch.config.data import DataRecipe, RecipeError
from launch.machine.network import START_TIMEOUT
from shards.ranges import Seconds, Seed, Steps, check_ranges
from shards.redact import printable, redacted

__all__ = ["VARIANTS", "DataRecipe", "ModelRecipe", "OptimRecipe", "Recipe", "RecipeError", "RunRecipe", "Variant"]

# The released code's rates are given for a batch of 512 and scale linearly.
LR_REFERENCE_BATCH = 512
DEFAULT_WARMUP = 20.0
# Of all epochs. The cosine spans the whole training, so the rate falls when a long warm-up ends: by 2.5 % after this.
MOST_WARMUP = 0.1
# The ranks that wait for the one that waits for the run folder's lock end with a timeout that names no lock.
LONGEST_LOCK_WAIT = (START_TIMEOUT - timedelta(minutes=1)).total_seconds()
# The watchdog's last resort ends a stuck trainer a minute after the stall timeout.
BEYOND_STALL = 120.0

Variant = Literal["b0", "b1", "b2", "b3"]
Name = Literal["adamw"]
Form = Literal["fused", "foreach"]
Rate = Annotated[float, Interval(ge=0, le=100)]
Decay = Annotated[float, Interval(ge=0, lt=1)]


@dataclass(frozen=True, kw_only=True)
class ModelRecipe:
    """What is trained."""

    variant: Variant = "b0"
    """FAT variant."""
    drop_path: Decay | None = None
    """Stochastic depth of the last block, rising linearly from 0 at the first. None = the variant's own."""
    weights: Path | None = None
    """Start from these weights (safetensors, or the released layout) instead of a random model: fine-tuning."""
    classes: Annotated[int, Interval(ge=1, le=1_000_000)] | None = None
    """Classes of the model. None = the data set's. With --weights of another number, the head starts afresh."""
    freeze_bn: bool = False
    """BatchNorm uses and keeps its running statistics (fine-tuning with small batches)."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class OptimRecipe:
    """The optimiser, its schedule and the loss."""

    optimizer: Name = "adamw"
    """Optimiser."""
    optimizer_form: Form | None = None
    """fused = one kernel per group of parameters; foreach = several. None = what was measured, else fused."""
    epochs: Annotated[int, Interval(ge=1, le=1_000_000)] = 300
    """Passes over the training split."""
    lr: Rate | None = None
    """Where the cosine starts, and so the rate that warm-up aims at. None = 5e-4 x global batch / 512."""
    warmup_lr: Rate | None = None
    """Rate of the first step. None = 5e-7 x global batch / 512."""
    min_lr: Rate | None = None
    """Rate at the end. None = 5e-6 x global batch / 512."""
    warmup_epochs: Annotated[float, Interval(ge=0, le=1_000_000)] | None = None
    """Epochs of linear warm-up. None = 20, or a tenth of --epochs where that is less."""
    weight_decay: Rate = 0.05
    """Decoupled weight decay; 1-D parameters and biases have none."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """AdamW's decay rates."""
    eps: Annotated[float, Interval(gt=0, le=1)] = 1e-8
    """AdamW's epsilon."""
    clip_grad: Annotated[float, Interval(ge=0, le=10**9)] = 5.0
    """Largest gradient norm; 0 = no clipping."""
    label_smoothing: Decay = 0.1
    """Share of the target spread evenly over all classes."""
    ema: Decay = 0.0
    """Decay per step of a moving average of the weights, evaluated and exported beside them; 0 = none. Step t decays by
    (1 + t) / (10 + t) at most, so that the average of a short run is of weights that were trained."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.warmup >= self.epochs:
            raise RecipeError(
                f"--warmup-epochs {self.warmup:g} of --epochs {self.epochs}: warm-up must be shorter; use at most "
                f"{self.most_warmup:g}, or leave it out"
            )

    @property
    def warmup(self) -> float:
        """`warmup_epochs`, settled."""
        return min(DEFAULT_WARMUP, self.most_warmup) if self.warmup_epochs is None else self.warmup_epochs

    @property
    def most_warmup(self) -> float:
        """Epochs of warm-up after which the cosine has fallen by no more than 2.5 %."""
        return self.epochs * MOST_WARMUP


@dataclass(frozen=True, kw_only=True)
class RunRecipe:
    """How and where it runs."""

    out: Path = Path("runs/fat")
    """Run folder: recipe, metrics, checkpoints, curves."""
    seed: Seed = 0
    """Seed of everything random."""
    zero: Literal["auto", 0, 1, 2, 3] = "auto"
    """DeepSpeed ZeRO stage; 0 = plain data parallel. auto = 1 on several GPUs, 0 on one GPU and on CPUs."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """bf16 = autocast with fp32 parameters and statistics. auto = bf16 on GPUs, fp32 on CPUs."""
    resume: Literal["auto", "never"] = "auto"
    """auto = go on from the newest checkpoint of the run folder, if there is one."""
    lock_wait: Seconds | None = None
    """Seconds to wait for an earlier trainer that still holds the run folder: it may be saving or stuck, and the lock
    of a dead host takes a minute or more to go. None = two minutes more than --stall-timeout, which ends a stuck one
    (at most 29 minutes)."""
    sync_bn: str = "auto"
    """BatchNorm over ranks: auto (synchronised on several GPUs), on, off, or group:N (within N neighbouring ranks)."""
    memory_format: Literal["channels-last", "contiguous"] | None = None
    """Of the weights. None = what was measured, else channels-last without ZeRO, which can only have contiguous ones.
    Images and what becomes of them are channels-last either way."""
    kernels: Literal["auto", "off", "unchecked"] | None = None
    """FAT's own kernels, where there are any (docs/kernels.md). auto = compared with torch first, on a device and
    versions seen for the first time; unchecked = without that. None = $FAT_KERNELS, else what was measured, else
    auto."""
    compile: Literal["off", "cudagraphs", "auto", "default", "reduce-overhead", "max-autotune"] | None = None
    """off = eager; cudagraphs = forward and backward captured as CUDA graphs, without torch.compile; the others are
    modes of torch.compile, of which reduce-overhead and max-autotune use CUDA graphs of their own. None = what was
    measured, else cudagraphs on GPUs where they can be captured (docs/performance.md), and off on CPUs. auto = where
    nothing was measured, time cudagraphs, off, default and reduce-overhead on this GPU at the start, some minutes, and
    take the fastest (on CPUs: off)."""
    tuned: str = "auto"
    """Where the fastest values of options that are left open are kept: a file that 'pipeline tune' has written. auto =
    $FAT_TUNED, else ~/.cache/fat-pipeline/tuned.json ($XDG_CACHE_HOME, if set); off = nowhere, defaults are used."""
    tune: bool = False
    """Measure at the start what was neither given nor measured before, for model and loader, two minutes and more where
    compilation is tried, and keep it in the file of --tuned."""
    stop_after: Steps | None = None
    """End after this many optimiser steps (the schedule still spans all epochs). None = train to the end."""
    eval_every: Annotated[int, Interval(ge=1, le=1_000_000)] = 1
    """Evaluate and write a checkpoint every N epochs, and at the end."""
    save_every: Steps | None = None
    """Write a checkpoint every N optimiser steps too."""
    keep: Annotated[int, Interval(ge=1, le=1_000_000)] = 3
    """Checkpoints to keep, besides the best."""
    log_every: Annotated[int, Interval(ge=1, le=100_000)] = 10
    """Optimiser steps between two lines of metrics. Losses of all of them are kept on the device until then."""
    time_limit: Annotated[float, Interval(gt=0, le=1_000_000)] | None = None
    """Minutes after which to save and leave with status 75. None = the SLURM job's end, where there is one."""
    leave_seconds: Seconds = 120.0
    """Seconds before the SLURM job's end at which to save and leave: what a save and the processes' end take."""
    stall_timeout: Seconds = 300.0
    """Seconds without progress after which the stacks of all ranks are written and the run ends; 0 = never. Longer than
    the longest step or save. Before the first step, at least half an hour is allowed."""
    near_gpu: bool = True
    """Hold each rank to the cores (and so to the memory) near its GPU, where there are several NUMA nodes."""
    max_bad_steps: Annotated[int, Interval(ge=1, le=1_000_000)] = 10
    """Give up after this many steps in a row whose gradients are not finite (each is skipped)."""
    compare_every: Annotated[int, Interval(ge=0, le=10**12)] = 500
    """Optimiser steps between two checks that all ranks hold the same weights; 0 = never."""
    tracker: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Also log to these. wandb: project $WANDB_PROJECT, else fat-pipeline; WANDB_MODE=offline needs no server."""
    dry_run: bool = False
    """Show what the run would be (steps, rates, memory, checkpoint size) and touch nothing."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if not re.fullmatch(r"auto|on|off|group:[1-9]\d{0,5}", self.sync_bn):
            raise RecipeError(f"--sync-bn {printable(self.sync_bn)}: auto, on, off or group:N (up to 999999) expected")
        if self.lock_wait is not None and self.lock_wait > LONGEST_LOCK_WAIT:
            raise RecipeError(
                f"--lock-wait {self.lock_wait:g}: at most {LONGEST_LOCK_WAIT:g}, as the other ranks of a start wait no "
                "longer than half an hour for the first"
            )

    @property
    def lock_seconds(self) -> float:
        """`lock_wait`, settled."""
        if self.lock_wait is not None:
            return self.lock_wait
        return min(self.stall_timeout + BEYOND_STALL, LONGEST_LOCK_WAIT)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All of it."""

    model: ModelRecipe = field(default_factory=ModelRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    optim: OptimRecipe = field(default_factory=OptimRecipe)
    run: RunRecipe = field(default_factory=RunRecipe)

    def rates(self) -> tuple[float, float, float]:
        """(first, peak, last) learning rate."""
        scale = self.data.global_batch / LR_REFERENCE_BATCH
        optim = self.optim
        return (
            5e-7 * scale if optim.warmup_lr is None else optim.warmup_lr,
            5e-4 * scale if optim.lr is None else optim.lr,
            5e-6 * scale if optim.min_lr is None else optim.min_lr,
        )

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values without credentials, as `recipe.json` holds them."""
        return typing.cast(dict[str, Any], redacted(dataclasses.asdict(self)))


def b0() -> Recipe:
    """FAT-B0: 4.5 M parameters, 77.6 % top-1."""
    return Recipe(model=ModelRecipe(variant="b0"))


def b1() -> Recipe:
    """FAT-B1: 7.8 M parameters, 80.1 % top-1."""
    return Recipe(model=ModelRecipe(variant="b1"))


def b2() -> Recipe:
    """FAT-B2: 13.5 M parameters, 81.9 % top-1."""
    return Recipe(model=ModelRecipe(variant="b2"))


def b3() -> Recipe:
    """FAT-B3: 29.2 M parameters, 83.6 % top-1."""
    return Recipe(model=ModelRecipe(variant="b3"))


VARIANTS: dict[str, Callable[[], Recipe]] = {"b0": b0, "b1": b1, "b2": b2, "b3": b3}

"""The recipe: everything that decides what a run computes, as frozen dataclasses with a docstring per field.

The docstrings are the command line's help (`launch.command_line`); `b0()` .. `b3()` are the paper's recipes. Numbers
are the released code's unless a docstring says otherwise.
"""

from __future__ import annotations

import dataclasses
import os
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from launch.optimizers import Name
from pipeline.augment.recipe import AugmentRecipe, augment_recipe
from pipeline.loader import CROP_PCT, LoaderOptions
from pipeline.plan import DEFAULT_WINDOW
from pipeline.remote import is_remote
from pipeline.remote_set import open_set
from shards.dataset import ShardSet
from shards.errors import UserError

DEFAULT_DATA = Path("imagenet-shards")
# The released code's rates are given for a batch of 512 and scale linearly.
LR_REFERENCE_BATCH = 512

Variant = Literal["b0", "b1", "b2", "b3"]


class RecipeError(UserError):
    """Options that contradict one another or make no sense."""


@dataclass(frozen=True, kw_only=True)
class ModelRecipe:
    """What is trained."""

    variant: Variant = "b0"
    """FAT variant."""
    drop_path: float | None = None
    """Stochastic depth of the last block, rising linearly from 0 at the first. None = the variant's own."""
    weights: Path | None = None
    """Start from these weights (safetensors, or the released layout) instead of a random model: fine-tuning."""
    classes: int | None = None
    """Classes of the model. None = the data set's. With --weights of another number, the head starts afresh."""
    freeze_bn: bool = False
    """BatchNorm uses and keeps its running statistics (fine-tuning with small batches)."""


@dataclass(frozen=True, kw_only=True)
class DataRecipe:
    """What the run is fed."""

    data: str | None = None
    """Shard set made by 'pipeline shard': a folder, or a URL (s3://, https://, what fsspec knows). None = $FAT_DATA,
    else ./imagenet-shards."""
    cache: Path | None = None
    """Where a remote set is staged, once per node; on a local disk. None = $FAT_CACHE, else in the temporary folder."""
    cache_size: float | None = None
    """Room in the cache in GiB. None = four fifths of what is free there."""
    size: int = 224
    """Side of the images in pixels."""
    global_batch: int = 1024
    """Images per optimiser step over all ranks. Part of the run: it cannot change on resume."""
    micro_batch: int | None = None
    """Images per forward pass of a rank; gradients are accumulated over the rest. None = all of the rank's at once."""
    eval_batch: int | None = None
    """Images per rank and evaluation step. None = the rank's rows of a global batch, at most 256."""
    lanes: int | None = None
    """Contiguous streams that every batch is mixed from. None = the largest divisor of half the batch up to 64."""
    window: int = DEFAULT_WINDOW
    """Samples among which each stream shuffles."""
    augment: Literal["fat", "light", "none"] = "fat"
    """Augmentation: the paper's, crop and flip only, or a fixed centre crop. The fields below override parts of it."""
    crop_scale: tuple[float, float] | None = None
    """Area of the random crop, as shares of the image."""
    crop_pct: float = CROP_PCT
    """Share of the short side that evaluation looks at: the centre crop after resizing to size / crop_pct."""
    flip: float | None = None
    """Probability of a horizontal flip."""
    rand_augment: str | None = None
    """RandAugment in timm's syntax, such as rand-m9-mstd0.5-inc1; '' = off."""
    erase: float | None = None
    """Probability of random erasing."""
    mixup: float | None = None
    """Mixup's alpha; 0 = off."""
    cutmix: float | None = None
    """Cutmix's alpha; 0 = off."""
    loader: LoaderOptions = field(default_factory=LoaderOptions)

    def __post_init__(self) -> None:
        for name in ("size", "global_batch", "window"):
            if getattr(self, name) < 1:
                raise RecipeError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least 1")
        if self.eval_batch is not None and self.eval_batch < 1:
            raise RecipeError(f"--eval-batch {self.eval_batch}: at least 1")
        if not 0 < self.crop_pct <= 1:
            raise RecipeError(f"--crop-pct {self.crop_pct}: between 0 and 1; the paper's is {CROP_PCT}")

    def augmentation(self) -> AugmentRecipe:
        """The augmentation recipe that the fields amount to."""
        overrides: dict[str, Any] = {
            "scale": self.crop_scale,
            "flip": self.flip,
            "erase": self.erase,
            "mixup": self.mixup,
            "cutmix": self.cutmix,
        }
        overrides = {name: value for name, value in overrides.items() if value is not None}
        if self.rand_augment is not None:
            overrides["rand_augment"] = self.rand_augment or None
        return augment_recipe(self.augment, size=self.size, **overrides)

    def open(self) -> ShardSet:
        """Open the shard set, which may be on a server.

        Raises:
            UserError: no such set, or a cache that cannot be used.
        """
        return open_set(self.location(), cache=self.cache, cache_gib=self.cache_size)

    def location(self) -> Path | str:
        """The shard set's folder or URL: `data`, else $FAT_DATA, else ./imagenet-shards.

        Raises:
            RecipeError: none was named and the defaults do not exist.
        """
        named = self.data or os.environ.get("FAT_DATA")
        if named:
            return named if is_remote(named) else Path(named)
        if DEFAULT_DATA.exists():
            return DEFAULT_DATA
        raise RecipeError(
            f"no data: give --data SET, set FAT_DATA, or make ./{DEFAULT_DATA} with 'pipeline shard imagenet/' "
            f"(neither FAT_DATA nor ./{DEFAULT_DATA} exists)"
        )


@dataclass(frozen=True, kw_only=True)
class OptimRecipe:
    """The optimiser, its schedule and the loss."""

    optimizer: Name = "adamw"
    """Optimiser."""
    epochs: int = 300
    """Passes over the training split."""
    lr: float | None = None
    """Peak learning rate. None = 5e-4 x global batch / 512."""
    warmup_lr: float | None = None
    """Rate of the first step. None = 5e-7 x global batch / 512."""
    min_lr: float | None = None
    """Rate at the end. None = 5e-6 x global batch / 512."""
    warmup_epochs: float = 20
    """Epochs of linear warm-up."""
    weight_decay: float = 0.05
    """Decoupled weight decay; 1-D parameters and biases have none."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    clip_grad: float = 5.0
    """Largest gradient norm; 0 = no clipping."""
    label_smoothing: float = 0.1
    """Share of the target spread evenly over all classes."""
    ema: float = 0.0
    """Decay per step of a moving average of the weights, evaluated and exported beside them; 0 = none."""

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise RecipeError(f"--epochs {self.epochs}: at least 1")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise RecipeError(
                f"--warmup-epochs {self.warmup_epochs:g} of --epochs {self.epochs}: warm-up must be shorter"
            )
        for name in ("lr", "warmup_lr", "min_lr", "weight_decay", "eps", "clip_grad"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise RecipeError(f"--{name.replace('_', '-')} {value:g}: not negative")
        if not 0 <= self.ema < 1:
            raise RecipeError(f"--ema {self.ema:g}: a decay in [0, 1), such as 0.9999")
        if not 0 <= self.label_smoothing < 1:
            raise RecipeError(f"--label-smoothing {self.label_smoothing:g}: a share in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class RunRecipe:
    """How and where it runs."""

    out: Path = Path("runs/fat")
    """Run folder: recipe, metrics, checkpoints, curves."""
    seed: int = 0
    """Seed of everything random."""
    zero: Literal["auto", 0, 1, 2, 3] = "auto"
    """DeepSpeed ZeRO stage; 0 = plain data parallel. auto = 1 on GPUs, 0 on CPUs."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """bf16 = autocast with fp32 parameters and statistics. auto = bf16 on GPUs, fp32 on CPUs."""
    resume: Literal["auto", "never"] = "auto"
    """auto = go on from the newest checkpoint of the run folder, if there is one."""
    lock_wait: float = 120.0
    """Seconds to wait for an earlier trainer that still holds the run folder: it may be saving, and the lock of a dead
    host takes a minute or more to go."""
    sync_bn: str = "auto"
    """BatchNorm over ranks: auto (synchronised on several GPUs), on, off, or group:N (within N neighbouring ranks)."""
    compile: Literal["off", "auto", "default", "reduce-overhead", "max-autotune"] = "off"
    """torch.compile mode; reduce-overhead and max-autotune use CUDA graphs. auto = time off, default and
    reduce-overhead on this GPU at the start, some minutes, and take the fastest (on CPUs: off)."""
    stop_after: int | None = None
    """End after this many optimiser steps (the schedule still spans all epochs). None = train to the end."""
    eval_every: int = 1
    """Evaluate and write a checkpoint every N epochs, and at the end."""
    save_every: int | None = None
    """Write a checkpoint every N optimiser steps too."""
    keep: int = 3
    """Checkpoints to keep, besides the best."""
    log_every: int = 10
    """Optimiser steps between two lines of metrics."""
    time_limit: float | None = None
    """Minutes after which to save and leave with status 75. None = the SLURM job's end, where there is one."""
    leave_seconds: float = 120.0
    """Seconds before the SLURM job's end at which to save and leave: what a save and the processes' end take."""
    stall_timeout: float = 300.0
    """Seconds without progress after which the stacks of all ranks are written and the run ends; 0 = never. Longer than
    the longest step or save. Before the first step, at least half an hour is allowed."""
    near_gpu: bool = True
    """Hold each rank to the cores (and so to the memory) near its GPU, where there are several NUMA nodes."""
    max_bad_steps: int = 10
    """Give up after this many steps in a row whose gradients are not finite (each is skipped)."""
    compare_every: int = 500
    """Optimiser steps between two checks that all ranks hold the same weights; 0 = never."""
    tracker: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Also log to these (accelerate's trackers)."""
    dry_run: bool = False
    """Show what the run would be (steps, rates, memory, checkpoint size) and touch nothing."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"auto|on|off|group:[1-9]\d*", self.sync_bn):
            raise RecipeError(f"--sync-bn {self.sync_bn}: auto, on, off or group:N expected")
        for name in ("eval_every", "keep", "log_every", "max_bad_steps"):
            if getattr(self, name) < 1:
                raise RecipeError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least 1")
        for name in ("save_every", "stop_after", "time_limit"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise RecipeError(f"--{name.replace('_', '-')} {value}: more than 0")
        for name in ("leave_seconds", "stall_timeout", "lock_wait"):
            if getattr(self, name) < 0:
                raise RecipeError(f"--{name.replace('_', '-')} {getattr(self, name):g}: not negative")


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
        """Nested plain values, as `recipe.json` holds them."""
        return typing.cast(dict[str, Any], _plain(dataclasses.asdict(self)))


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


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value

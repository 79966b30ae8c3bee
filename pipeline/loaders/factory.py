"""Create the loaders of one process from a few arguments: `train_loader` and `eval_loader`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from pipeline.augment.recipe import AugmentRecipe, Color, augment_recipe
from pipeline.batch_shape import BatchShape, check_enough_samples
from pipeline.jobs import CROP_PCT
from pipeline.loader import EvalLoader, TrainLoader
from pipeline.loaders.process import local_world, rank_and_world
from pipeline.options import LoaderOptions
from pipeline.phases.size_schedule import SizeSchedule
from pipeline.phases.train_phase import DEFAULT_MIN_STRENGTH, phases_of
from pipeline.plan import DEFAULT_SHUFFLE_BLOCK_SIZE, EvalPlan, TrainPlan
from pipeline.storage.remote.shard_set import open_set
from shards.cores import cores
from shards.errors import UserError
from shards.format.dataset import ShardSet

DEFAULT_SIZE = 224


def train_loader(
    dataset: ShardSet | Path | str,
    *,
    batch_size: int | None = None,
    global_batch: int | None = None,
    size: int | None = None,
    size_schedule: str | None = None,
    min_strength: float = DEFAULT_MIN_STRENGTH,
    augment: AugmentRecipe | str = "fat",
    label_smoothing: float = 0.0,
    num_classes: int | None = None,
    seed: int = 0,
    epochs: int | None = None,
    split: str = "train",
    rank: int | None = None,
    world: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    lanes: int | None = None,
    shuffle_block_size: int = DEFAULT_SHUFFLE_BLOCK_SIZE,
    class_balance: float = 0.0,
    options: LoaderOptions | None = None,
) -> TrainLoader:
    """Return a loader of this process's batches of a training, for use like torch's DataLoader.

    Each `for` loop delivers one epoch of `len(loader)` batches, in an order and with augmentations that depend on the
    set, the recipe, the seed and the global batch, but not on the number of processes.

    Args:
        dataset: folder or URL of a shard set, or an opened set, such as one that `select` has reduced.
        batch_size: images per batch of this process, as in torch's DataLoader. If `global_batch` is also given,
            successive batches belong to the same optimizer step (gradient accumulation).
        global_batch: images per optimizer step, over all processes. None: `batch_size` times the number of processes.
        size: side of the images in pixels. None: 224, or the size of an `AugmentRecipe`; with `size_schedule`, its last
            size.
        size_schedule: progressive resizing: points POSITION:SIZE, for instance `0:128,65:192,85:224`
            (`SizeSchedule.parse`). Percentages need `epochs`.
        min_strength: factor of RandAugment's magnitude at the smallest size of the schedule, 0 to 1 (`phases_of`).
        augment: augmentation: the name of a recipe (fat, light or none), or an `AugmentRecipe`.
        label_smoothing: label smoothing of `Batch.targets`, 0 to 1.
        num_classes: number of classes of `Batch.targets`, if the model has more outputs than the set has classes.
        seed: seed of order and augmentation.
        epochs: number of epochs of the training. None: unlimited; call `close` after the last one.
        split: split of the set.
        rank, world: rank of this process and number of processes. None: those of torch.distributed if it is
            initialized, else of the environment variables RANK and WORLD_SIZE, else a single process.
        device: device of the batches. None: the GPU of this process if there is one, else the CPU.
        dtype: floating-point dtype of the images.
        lanes, shuffle_block_size: see `TrainPlan`.
        class_balance: 0: each image once per epoch. Above 0, up to 1: draw small classes more often, see `TrainPlan`.
        options: performance options and the handling of bad samples. By default the cores of the machine are divided
            among its processes (LOCAL_WORLD_SIZE).

    Raises:
        UserError: the set cannot be read, sizes do not divide each other, or an argument is invalid.

    Example:
        >>> from pipeline import train_loader
        >>> with train_loader("/data/imagenet-shards", batch_size=128, augment="fat", label_smoothing=0.1) as loader:
        ...     for epoch in range(loader.epoch, 300):
        ...         for batch in loader:
        ...             loss = F.cross_entropy(model(batch.images), batch.targets)
    """
    schedule = None if size_schedule is None else SizeSchedule.parse(size_schedule)
    if schedule is not None and size not in (None, schedule.last):
        raise UserError(f"size {size}: size_schedule {schedule} ends at {schedule.last} pixels; omit size")
    recipe = _recipe(augment, size if schedule is None else schedule.last)
    rank, world = rank_and_world(rank, world)
    if batch_size is None and global_batch is None:
        raise UserError("give batch_size (images per process) or global_batch (images over all processes)")
    for name, value in (("batch_size", batch_size), ("global_batch", global_batch), ("epochs", epochs)):
        _check_count(name, value)
    if batch_size is not None and batch_size % 2 and recipe.mixes:
        raise UserError(
            f"batch_size {batch_size}: must be even, because mixup and CutMix mix images in pairs; use "
            f"{batch_size + 1}, or an augmentation without them"
        )
    if global_batch is None:
        assert batch_size is not None
        global_batch = batch_size * world
    dataset = _open(dataset)
    samples = dataset.split(split).samples
    check_enough_samples(
        samples, global_batch, world=world, micro_batch=batch_size, lanes=lanes, pairs=recipe.mixes
    )  # first, because the global batch that this message suggests also passes the other checks
    shape = BatchShape(global_batch=global_batch, world=world, rank=rank, micro_batch=batch_size, pairs=recipe.mixes)
    plan = TrainPlan(
        dataset.shard_samples(split),
        global_batch=global_batch,
        seed=seed,
        lanes=lanes,
        shuffle_block_size=shuffle_block_size,
        pairs=recipe.mixes,
        class_balance=class_balance,
        labels=dataset.index(split)["label"] if class_balance else None,
    )
    phases = phases_of(
        schedule,
        augment=recipe,
        shape=shape,
        total_steps=None if epochs is None else epochs * plan.steps_per_epoch,
        steps_per_epoch=plan.steps_per_epoch,
        min_strength=min_strength,
    )
    return TrainLoader(
        dataset,
        plan,
        shape,
        recipe,
        epochs=epochs,
        device=device,
        dtype=dtype,
        split=split,
        options=_with_threads(options),
        label_smoothing=label_smoothing,
        num_classes=num_classes,
        phases=phases,
    )


def eval_loader(
    dataset: ShardSet | Path | str,
    *,
    batch_size: int,
    size: int = DEFAULT_SIZE,
    crop_pct: float = CROP_PCT,
    mean: Color = AugmentRecipe.mean,
    std: Color = AugmentRecipe.std,
    split: str = "val",
    rank: int | None = None,
    world: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    options: LoaderOptions | None = None,
) -> EvalLoader:
    """Return a loader of this process's batches of an evaluation. All processes together deliver each image once.

    Every batch has `batch_size` rows, and all processes get the same number of batches. Rows that only fill the last
    batches have a `mask` of False and targets of -100, which `F.cross_entropy` ignores.

    Args:
        dataset: folder or URL of a shard set, or an opened set.
        batch_size: images per batch of this process.
        size: side of the images in pixels.
        crop_pct: fraction of the short side that the center crop keeps.
        mean, std: normalization of red, green and blue, for values in 0 to 1. By default those of ImageNet.
        split: split of the set.
        rank, world, device, dtype, options: see `train_loader`.

    Raises:
        UserError: the set cannot be read, or an argument is invalid.

    Example:
        >>> from pipeline import eval_loader
        >>> with eval_loader("/data/imagenet-shards", batch_size=256) as loader:
        ...     for batch in loader:
        ...         correct += (model(batch.images).argmax(1) == batch.targets).sum()
        ...         count += batch.mask.sum()
    """
    for name, value in (("batch_size", batch_size), ("size", size)):
        _check_count(name, value)
    if not 0 < crop_pct <= 1:
        raise UserError(f"crop_pct {crop_pct}: expected a number above 0, at most 1")
    rank, world = rank_and_world(rank, world)
    dataset = _open(dataset)
    return EvalLoader(
        dataset,
        EvalPlan(dataset.split(split).samples, batch=batch_size, world=world, rank=rank),
        size=size,
        crop_pct=crop_pct,
        mean=mean,
        std=std,
        device=device,
        dtype=dtype,
        split=split,
        options=_with_threads(options),
    )


def _recipe(augment: AugmentRecipe | str, size: int | None) -> AugmentRecipe:
    _check_count("size", size)
    if isinstance(augment, str):
        return augment_recipe(augment, size=size or DEFAULT_SIZE)
    return augment if size is None else replace(augment, size=size)


def _open(dataset: ShardSet | Path | str) -> ShardSet:
    return dataset if isinstance(dataset, ShardSet) else open_set(dataset, local_ranks=local_world())


def _with_threads(options: LoaderOptions | None) -> LoaderOptions:
    """Return the options, with this process's part of the cores as the default number of decode threads."""
    options = options or LoaderOptions()
    return options if options.decode_threads else replace(options, decode_threads=max(cores() // local_world(), 1))


def _check_count(name: str, value: int | None) -> None:
    """Raise UserError unless the value is None or a whole number of at least 1."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise UserError(f"{name} {value!r}: expected a whole number, at least 1")

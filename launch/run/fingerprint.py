"""What a checkpoint holds of its run, and whether a run may resume from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fat
from fat.weights.classifier import difference
from launch.config.recipe import Recipe
from launch.feed import Feed
from launch.run.checkpoint import Checkpoint, CheckpointError, Fingerprint
from launch.run.saved_recipe import full_classes


def fingerprint(recipe: Recipe, feed: Feed) -> Fingerprint:
    """What every checkpoint holds of its run: `fixed` decides what is fed and what a step means, `free` may change."""
    plan, optim = feed.plan, recipe.optim
    validation = feed.dataset.manifest.splits.get("val")
    return Fingerprint(
        fixed={
            "variant": recipe.model.variant,
            "global_batch": plan.global_batch,
            "lanes": plan.lanes,
            "shuffle_block_size": plan.shuffle_block_size,
            "seed": plan.seed,
            "epochs": optim.epochs,
            "train_samples": plan.samples,
            "train_index": feed.dataset.split("train").index_hash,
            "val_index": validation.index_hash if validation else None,
            "augmentation": repr(feed.augment),
        },
        free={
            **{
                name: getattr(optim, name)
                for name in ("optimizer", "lr", "weight_decay", "clip_grad", "label_smoothing", "ema")
            },
            "crop_pct": recipe.data.crop_pct,
            "warmup_epochs": optim.warmup,
        },
    )


def check_fingerprint(found: Checkpoint, current: Fingerprint) -> list[str]:
    """Refuse to resume a run as another one; returns what else differs.

    Raises:
        CheckpointError: names each difference that would change what is fed or what a step means.
    """

    def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
        return [f"{key} was {before.get(key)}, is {value}" for key, value in now.items() if before.get(key) != value]

    fixed = found.fingerprint.fixed
    added = fixed.get("val_index") is None and current.fixed.get("val_index") is not None
    if added:  # no accuracy of other images is compared with the new ones
        fixed = fixed | {"val_index": current.fixed["val_index"]}
    if changed := changes(fixed, current.fixed):
        raise CheckpointError(
            f"{found.path}: saved by a different run ({'; '.join(changed)}); "
            "use the same options, another run folder (--out), or --resume never, which sets the old one aside"
        )
    said = ["the data set had no validation split, and has one now"] if added else []
    return said + changes(found.fingerprint.free, current.free)


def check_classes(found: Checkpoint, current: fat.ClassList, *, run: Path) -> None:
    """Refuse to resume with a data set of other classes, or of the same ones in another order.

    Raises:
        CheckpointError: names the classes that differ.
    """
    known = found.info().classes
    if known is not None and known.digest != current.digest:
        raise CheckpointError(
            f"{found.path}: saved by a run with other classes ({difference(full_classes(run, known), current)}); use "
            "the data set that it began with, another run folder (--out), or --resume never, which sets the old one "
            "aside"
        )


def check_position(found: Checkpoint, steps_per_epoch: int) -> None:
    """Raise an error if a checkpoint's step and position in the plan contradict each other.

    Raises:
        CheckpointError: names both.
    """
    progress = found.progress
    if (progress.epoch, progress.epoch_step) != divmod(progress.step, steps_per_epoch):
        raise CheckpointError(
            f"{found.path}: step {progress.step} is not step {progress.epoch_step} of epoch {progress.epoch}, at "
            f"{steps_per_epoch} steps per epoch; remove this checkpoint, then start again"
        )

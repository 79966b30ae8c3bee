"""The fingerprint of a run in its checkpoints, and a check that a run may resume from a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import fat
from fat.weights.classifier import difference
from launch.config.recipe import Recipe
from launch.feed import Feed
from launch.run.checkpoint import Checkpoint, CheckpointError, Fingerprint, Scalar
from launch.run.progress import Progress
from launch.run.saved_recipe import restore_class_names


def fingerprint(recipe: Recipe, feed: Feed, *, teacher: str | None) -> Fingerprint:
    """Return the fingerprint of a run: `fixed` are the options that determine its batches and steps.

    Args:
        teacher: digest of the weights of the distillation's teacher; None: no distillation.
    """
    plan, optim, loader = feed.plan, recipe.optim, recipe.data.loader
    validation = feed.dataset.manifest.splits.get("val")
    return Fingerprint(
        fixed={
            "model": str(recipe.model.spec),
            "global_batch": plan.global_batch,
            "lanes": plan.lanes,
            "shuffle_block_size": plan.shuffle_block_size,
            "seed": plan.seed,
            "optimizer": optim.optimizer,
            "freeze_backbone": recipe.model.freeze_backbone,
            "train_samples": plan.samples,
            "train_index": feed.dataset.split("train").index_hash,
            "val_index": validation.index_hash if validation else None,
            "fraction": recipe.data.fraction,
            "class_balance": recipe.data.class_balance,
            "augmentation": repr(feed.augment),
            "size_schedule": None if recipe.data.sizes is None else str(recipe.data.sizes),
            "min_strength": None if recipe.data.sizes is None else recipe.data.min_strength,
            "teacher": teacher,
        },
        free={
            **{
                name: getattr(optim, name)
                for name in (
                    *("epochs", "lr", "warmup_lr", "min_lr", "layer_decay", "head_lr_scale", "weight_decay", "eps"),
                    *("momentum", "nesterov", "clip_grad", "loss", "bce_target_threshold", "label_smoothing", "ema"),
                )
            },
            **{
                name: getattr(recipe.distillation, name)
                for name in ("distillation", "distillation_alpha", "distillation_temperature")
            },
            "betas": str(optim.betas),
            "drop_path": recipe.model.drop_path,
            "freeze_bn": recipe.model.freeze_bn,
            "crop_pct": recipe.data.crop_pct,
            "eval_size": recipe.data.evaluation_size,
            "recalibrate_bn": recipe.model.recalibrate_bn,
            # Shrinking changes the pixels of the samples that are cached, which depend on the size of the cache.
            "memory_cache": loader.memory_cache if loader.memory_cache_short_side else None,
            "memory_cache_short_side": loader.memory_cache_short_side if loader.memory_cache else None,
            "warmup_epochs": optim.warmup,
            "schedule": optim.resolved_schedule,
            "decay_fraction": optim.decay_fraction,
        },
    )


def check_fingerprint(found: Checkpoint, current: Fingerprint) -> list[str]:
    """Check that a run may resume from its checkpoint; return the differences that are permitted.

    Raises:
        CheckpointError: options that determine the batches or steps differ; the message names them.
    """
    fixed = found.fingerprint.fixed
    added = fixed.get("val_index") is None and current.fixed.get("val_index") is not None
    if added:  # a new validation split is permitted: there are no earlier accuracies to compare with
        fixed = fixed | {"val_index": current.fixed["val_index"]}
    if changed := _changes(fixed, current.fixed):
        raise CheckpointError(
            f"{found.path}: saved by a run with other options ({'; '.join(changed)}); use the same options, another "
            "run folder (--out), into which --resume can branch from a checkpoint, or --resume never, which keeps the "
            "old checkpoints in checkpoints-before-N"
        )
    permitted = ["the data set had no validation split, and has one now"] if added else []
    return permitted + _changes(found.fingerprint.free, current.free)


# Options in `Fingerprint.fixed` that may differ in a branch. They change the images and labels of later batches, but
# neither which samples a batch has nor the meaning of the saved tensors.
FREE_IN_BRANCH = ("augmentation", "size_schedule", "min_strength", "teacher", "val_index")
# Options that decide the order of samples within an epoch. A branch may change them where an epoch ends: after each
# complete epoch, every order has used every sample.
FREE_BETWEEN_EPOCHS = ("seed", "lanes", "shuffle_block_size")
# Options whose change makes accuracies incomparable with those before the branch.
_EVALUATED = ("val_index", "eval_size", "crop_pct")


def check_branch(found: Checkpoint, current: Fingerprint) -> list[str]:
    """Check that a new run may branch from a checkpoint; return the differences that are permitted.

    Raises:
        CheckpointError: options differ that the saved tensors or the position in the data depend on.
    """
    before, position = found.fingerprint.fixed, found.progress.epoch_step
    changed = {key: value for key, value in current.fixed.items() if before.get(key) != value}
    within = [key for key in changed if key in FREE_BETWEEN_EPOCHS and position]
    rejected = {key: changed[key] for key in changed if key not in (*FREE_IN_BRANCH, *FREE_BETWEEN_EPOCHS)}
    if rejected:
        raise CheckpointError(
            f"{found.path}: a branch cannot change these options ({'; '.join(_changes(before, rejected))}), because "
            "the saved model, optimizer and position in the data depend on them; use the same options, or start a new "
            "run from the weights of that run with --weights"
        )
    if within:
        facts = _changes(before, {key: changed[key] for key in within})
        raise CheckpointError(
            f"{found.path}: is within an epoch ({position:,} steps after its beginning), where a branch cannot change "
            f"the order of the samples ({'; '.join(facts)}); use the same options, or branch from a checkpoint at the "
            "end of an epoch"
        )
    return _changes(before, changed) + _changes(found.fingerprint.free, current.free)


def first_progress(found: Checkpoint, current: Fingerprint) -> Progress:
    """Return the progress with which a branch begins.

    Its best accuracy is that of the checkpoint itself: the new run folder has no weights of earlier steps.
    """
    earlier, progress = found.fingerprint, found.progress
    before, now = earlier.fixed | earlier.free, current.fixed | current.free
    comparable = all(before.get(name) == now.get(name) for name in _EVALUATED)
    first = replace(progress, best=0.0, best_of=None, is_best=False, top1={})
    return first.evaluated(progress.top1) if progress.top1 and comparable else first


def _changes(before: dict[str, Scalar], now: dict[str, Scalar]) -> list[str]:
    return [f"{key} was {before.get(key)}, now {value}" for key, value in now.items() if before.get(key) != value]


def check_classes(found: Checkpoint, current: fat.ClassList, *, run: Path) -> None:
    """Check that the data set has the classes of the checkpoint's run, in the same order.

    Raises:
        CheckpointError: the classes differ; the message names them.
    """
    known = found.info().classes
    if known is not None and known.digest != current.digest:
        differing = difference(restore_class_names(run, known), current)
        raise CheckpointError(
            f"{found.path}: saved by a run with other classes ({differing}); "
            "use the data set of that run, another run folder (--out), or --resume never, which keeps the old "
            "checkpoints in checkpoints-before-N"
        )


def check_position(found: Checkpoint, steps_per_epoch: int) -> None:
    """Check that a checkpoint's step and position in the plan do not contradict each other.

    Raises:
        CheckpointError: they contradict each other; the message names both.
    """
    progress = found.progress
    if (progress.epoch, progress.epoch_step) != divmod(progress.step, steps_per_epoch):
        raise CheckpointError(
            f"{found.path}: step {progress.step} is not step {progress.epoch_step} of epoch {progress.epoch}, with "
            f"{steps_per_epoch} steps per epoch; remove this checkpoint, then start the run again"
        )

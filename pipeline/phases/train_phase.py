"""The phases of a training: consecutive steps with the same image size, augmentation and micro-batch size.

This module does not import torch, so that it can be used in the feed process (`pipeline.feed_process`).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pipeline.augment.recipe import AugmentRecipe, with_magnitude
from pipeline.batch_shape import BatchShape, PlanError
from pipeline.phases.size_schedule import SizeSchedule
from shards.errors import UserError

DEFAULT_MIN_STRENGTH = 0.5
"""Strength of RandAugment and drop path at the smallest size. EfficientNetV2-S (arXiv 2104.00298, table 6) begins with
a third at 128 of 300 pixels (RandAugment 5 of 15, dropout 0.1 of 0.3), and raises it linearly with the size; the same
line gives a half at 128 of 224 pixels."""


@dataclass(frozen=True, kw_only=True)
class TrainPhase:
    """Consecutive steps of a training with the same image size, augmentation and micro-batch size."""

    first_step: int
    """First optimizer step, counted over all epochs from 0."""
    augment: AugmentRecipe
    """Augmentation; `augment.size` is the side of the images in pixels."""
    shape: BatchShape
    """This rank's part of each global batch, and its micro-batch size."""
    strength: float = 1.0
    """Factor of the drop path rates, 0 to 1; `augment` already includes it."""


def phases_of(
    schedule: SizeSchedule | None,
    *,
    augment: AugmentRecipe,
    shape: BatchShape,
    total_steps: int | None,
    steps_per_epoch: int,
    min_strength: float = DEFAULT_MIN_STRENGTH,
    micro_batches: Mapping[int, int] | None = None,
) -> tuple[TrainPhase, ...]:
    """Return the phases of a training in order, which depend on the arguments only. The first begins at step 0.

    Args:
        schedule: the size schedule. None: one phase, with `augment` and `shape`.
        augment: augmentation at the largest size of the schedule.
        shape: part of each global batch, and micro-batch size where `micro_batches` has none.
        total_steps: optimizer steps of all epochs. None: a training without end.
        steps_per_epoch: optimizer steps per epoch.
        min_strength: factor of the mean magnitude of RandAugment at the smallest size, 0 to 1. It rises linearly with
            the size to 1 at the largest; magnitudes are rounded to the nearest whole number, halves up.
        micro_batches: rows per forward pass of a rank by size, for some sizes.

    Raises:
        UserError: a point of the schedule is beyond the last epoch.
        PlanError: a micro-batch size does not divide the rows of a rank; the message names the image size.
    """
    if schedule is None:
        return (TrainPhase(first_step=0, augment=augment, shape=shape),)
    if not 0 <= min_strength <= 1:
        raise UserError(f"min_strength {min_strength}: expected a number from 0 to 1")
    phases = []
    for first_step, size in schedule.sizes(total_steps, steps_per_epoch):
        strength = schedule.strength(size, min_strength)
        phases.append(
            TrainPhase(
                first_step=first_step,
                augment=_weakened(replace(augment, size=size), strength),
                shape=with_micro_batch(shape, size, (micro_batches or {}).get(size, shape.micro_batch)),
                strength=strength,
            )
        )
    return tuple(phases)


def phase_at(phases: Sequence[TrainPhase], step: int) -> TrainPhase:
    """Return the phase of an optimizer step."""
    return phases[bisect_right(phases, step, key=lambda phase: phase.first_step) - 1]


def check_phases(phases: Sequence[TrainPhase], shape: BatchShape, augment: AugmentRecipe) -> None:
    """Raise ValueError unless the phases begin at step 0, are in order, and differ from `shape` and `augment` only in
    the micro-batch size, the image size and the RandAugment policy."""
    firsts = [phase.first_step for phase in phases]
    if not firsts or firsts[0] != 0 or firsts != sorted(set(firsts)):
        raise ValueError(f"phases begin at the steps {firsts}; expected ascending steps from 0")
    for phase in phases:
        same_shape = replace(phase.shape, micro_batch=shape.micro_batch) == shape
        recipe = replace(phase.augment, size=augment.size, rand_augment=augment.rand_augment)
        if not same_shape or recipe != augment:
            raise ValueError(
                f"{phase} differs from {shape} or {augment} in more than micro-batch size, image size and RandAugment"
            )


def _weakened(augment: AugmentRecipe, strength: float) -> AugmentRecipe:
    if augment.policy is None or augment.rand_augment is None:
        return augment
    magnitude = math.floor(augment.policy.magnitude * strength + 0.5)
    return replace(augment, rand_augment=with_magnitude(augment.rand_augment, magnitude))


def with_micro_batch(shape: BatchShape, size: int, micro_batch: int | None) -> BatchShape:
    """Return a shape with the micro-batch size of images of `size` pixels.

    Raises:
        PlanError: it does not divide the rows of a rank; the message names the image size.
    """
    try:
        return replace(shape, micro_batch=micro_batch)
    except PlanError as error:
        raise PlanError(f"micro-batch schedule, images of {size} pixels: {error}") from None

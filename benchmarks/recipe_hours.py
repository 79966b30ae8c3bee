"""Compute how long the recipes for ImageNet-1K take on a node of 8 GPUs, from the measured step of FAT-B0.

    python benchmarks/recipe_hours.py

A step takes as long as the GPU needs for its images, or as long as the host needs to launch it, whichever is longer.
The first time is that of one H200 (batch 256, 224 pixels, CUDA graphs), in proportion to the number of pixels, as in
`pipeline capacity`, which also predicts other numbers of nodes, but no progressive resizing. The result is a lower
bound: it assumes that the GPUs neither wait for data nor for one another, and includes no evaluations, saves and
starts.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.capacity.costs.compute import StepTimes
from launch.capacity.reference import IMAGENET_IMAGES, h200
from launch.config.command_line import parse
from launch.config.recipe import Recipe
from pipeline.batch_shape import BatchShape
from pipeline.phases.train_phase import phases_of

GPUS = 8
RECIPES = ("fat_b0_300", "fat_b0_88", "fat_b0_30")


def step_seconds(images: int, size: int) -> float:
    """Return the computed time of a step with `images` images per GPU."""
    known = h200()
    times = StepTimes(((known.batch, known.batch / known.images_per_second["fat_b0"]),), known.launch_seconds)
    return max(times.launch, times.at_size(size, known.size).seconds(images))


def phases(recipe: Recipe) -> list[tuple[int, int, float]]:
    """Return the image size, the number of steps and the seconds per step of each phase of a training on ImageNet."""
    data = recipe.data
    epoch = IMAGENET_IMAGES // data.global_batch
    total = recipe.optim.epochs * epoch
    shape = BatchShape(global_batch=data.global_batch, world=GPUS, rank=0)
    found = phases_of(
        data.sizes, augment=data.augmentation(), shape=shape, total_steps=total, steps_per_epoch=epoch,
        min_strength=data.min_strength,
    )  # fmt: skip
    ends = [phase.first_step for phase in found[1:]] + [total]
    return [
        (phase.augment.size, end - phase.first_step, step_seconds(shape.rank_rows, phase.augment.size))
        for phase, end in zip(found, ends, strict=True)
    ]


def hours(recipe: Recipe) -> float:
    """Return the computed hours of a training on ImageNet."""
    return sum(steps * seconds for _, steps, seconds in phases(recipe)) / 3600


def main() -> None:
    for name in RECIPES:
        recipe = parse(["--recipe", name])
        print(f"{name}: {hours(recipe):.2f} hours ({60 * hours(recipe):.0f} minutes)")
        for size, steps, seconds in phases(recipe):
            print(f"  {size} pixels: {steps:,} steps of {1000 * seconds:.1f} ms")


if __name__ == "__main__":
    main()

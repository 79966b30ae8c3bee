"""Measurement of the fastest options of the training step: memory format, optimizer, compile mode, FAT's kernels.

Each value is measured with the same engine as in training, on images that are already on the device.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import get_args

import torch

import fat.kernels
from launch.bench.phases import model_alone, resident_batches, training_step
from launch.config.engine import MemoryFormat, OptimizerImpl
from launch.engine.build import build_model
from launch.engine.engine import Engine
from launch.engine.execution import Execution
from launch.feed import Feed
from launch.teacher import load_teacher
from launch.tuning.trials import Choice, Values, tune
from shards.progress import Phases

STEPS = {"cuda": 10, "cpu": 2}
ROUNDS = 3
MARGIN = 1.02


def tune_model(feed: Feed, *, ranks: int, seconds: float, progress: Phases) -> dict[str, Choice]:
    """Choose values for the unset options of [compile]; see `launch.tuning.trials.tune`.

    Args:
        feed: feed of one of `ranks` ranks, from `launch.bench.one_rank`.
    """

    def rate(values: Values) -> float:
        return steps_rate(feed, values, ranks=ranks)

    found = tune(candidates(feed, ranks=ranks), rate, rounds=ROUNDS, margin=MARGIN, seconds=seconds, progress=progress)
    free_memory()
    return found


def candidates(feed: Feed, *, ranks: int) -> list[list[Values]]:
    """Return the values to try, the default first, for each unset option of the recipe."""
    recipe, device = feed.recipe, feed.world.device
    default = Execution.of(recipe, device, accumulation=feed.shape.accumulation, ranks=ranks)
    values: dict[str, tuple[str, ...]] = {
        "memory_format": get_args(MemoryFormat),
        "optimizer_impl": get_args(OptimizerImpl),
    }
    if device.type == "cuda":  # compilation does not speed up training on CPUs
        # "reduce-overhead" is tried for a single rank only: a measurement without collectives cannot show whether the
        # compiler's own CUDA graphs work with them.
        values["compile"] = ("cudagraphs", "off", "default", *(("reduce-overhead",) if ranks == 1 else ()))
    if recipe.model.spec.is_fat and fat.kernels.available(device.type):  # False if $FAT_KERNELS is off
        values["kernels"] = ("auto", "off")  # measured last, because the result depends on the compile mode
    return [
        [{name: value} for value in dict.fromkeys((getattr(default, name), *tried))]
        for name, tried in values.items()
        if getattr(recipe.compile, name) is None
    ]


def steps_rate(feed: Feed, values: Values, *, ranks: int) -> float:
    """Measure the images per second of complete training steps with the given values of [compile].

    Raises:
        RecipeError: training on `ranks` ranks does not support this combination.
    """
    free_memory()
    recipe, world, shape = feed.recipe, feed.world, feed.shape
    recipe = replace(recipe, compile=replace(recipe.compile, **values))
    Execution.of(recipe, world.device, accumulation=shape.accumulation, ranks=ranks)
    model = build_model(recipe, feed.classes)
    teacher, _ = load_teacher(feed)
    engine = Engine(model, recipe, world, shapes=feed.input_shapes[-1:], teacher=teacher)
    try:
        return model_alone(
            resident_batches(feed, engine),
            training_step(feed, engine, accumulation=shape.accumulation),
            steps=STEPS[world.device.type],
            batch=shape.micro_rows * shape.accumulation,
            device=world.device,
        ).rate
    finally:
        engine.close()


def free_memory() -> None:
    """Free the memory of the previous engine. Must not be called in an exception handler, which still references it."""
    gc.collect()
    if torch.cuda.is_available():
        torch._dynamo.reset()
        torch.cuda.empty_cache()

"""Measure how the training step runs fastest: memory format, optimizer implementation, compile mode, FAT's own kernels.

Each value is measured by the engine that training would have with it, on images that are on the device already.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
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
from launch.tuning.trials import Choice, Values, tune

STEPS = {"cuda": 10, "cpu": 2}
ROUNDS = 3
MARGIN = 1.02


def tune_model(feed: Feed, *, ranks: int, seconds: float, say: Callable[[str], None]) -> dict[str, Choice]:
    """Choose the values of [compile] that the recipe leaves open; see `launch.tuning.trials.tune`.

    Args:
        feed: of one of `ranks` ranks, from `launch.bench.one_rank`.
    """

    def rate(values: Values) -> float:
        return steps_rate(feed, values, ranks=ranks)

    found = tune(candidates(feed, ranks=ranks), rate, rounds=ROUNDS, margin=MARGIN, seconds=seconds, say=say)
    free_memory()
    return found


def candidates(feed: Feed, *, ranks: int) -> list[list[Values]]:
    """The values to try of each option that the recipe leaves open, the default first."""
    recipe, device = feed.recipe, feed.world.device
    default = Execution.of(recipe, device, accumulation=feed.shape.accumulation, ranks=ranks)
    values: dict[str, tuple[str, ...]] = {
        "memory_format": get_args(MemoryFormat),
        "optimizer_impl": get_args(OptimizerImpl),
    }
    if device.type == "cuda":  # on CPUs compiled training is no faster
        # Beside the collectives of several ranks, one rank's measurement does not show that the compiler's own CUDA
        # graphs work.
        values["compile"] = ("cudagraphs", "off", "default", *(("reduce-overhead",) if ranks == 1 else ()))
    if fat.kernels.available(device.type):  # not where $FAT_KERNELS is off
        values["kernels"] = ("auto", "off")  # last: a compiled model may be faster without them
    return [
        [{name: value} for value in dict.fromkeys((getattr(default, name), *tried))]
        for name, tried in values.items()
        if getattr(recipe.compile, name) is None
    ]


def steps_rate(feed: Feed, values: Values, *, ranks: int) -> float:
    """Return images per second of whole training steps with some values of [compile].

    Raises:
        RecipeError: training on `ranks` ranks cannot combine them.
    """
    free_memory()
    recipe, world, shape = feed.recipe, feed.world, feed.shape
    recipe = replace(recipe, compile=replace(recipe.compile, **values))
    Execution.of(recipe, world.device, accumulation=shape.accumulation, ranks=ranks)
    model = build_model(recipe, feed.classes)
    engine = Engine(model, recipe, world, micro_batch=shape.micro_rows, accumulation=shape.accumulation)
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
    """Free what the engine before has left; not in the handler of its exception, which still refers to it."""
    gc.collect()
    if torch.cuda.is_available():
        torch._dynamo.reset()
        torch.cuda.empty_cache()

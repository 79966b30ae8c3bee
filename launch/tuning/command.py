"""Measure the performance options that a recipe leaves open, in one process: `pipeline tune`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import date
from typing import Literal

import torch

from launch.bench.one_rank import one_rank
from launch.config.recipe import Recipe
from launch.engine.execution import zero_and_precision
from launch.machine.provenance import device_name, versions
from launch.tuning.loader import tune_loader
from launch.tuning.model import tune_model
from launch.tuning.recipe_fragment import recipe_fragment
from launch.tuning.trials import Choice

Target = Literal["model", "input"]
TARGETS: tuple[Target, ...] = ("model", "input")


def tune(
    recipe: Recipe, targets: Sequence[Target], *, ranks: int, seconds: float, command: str, say: Callable[[str], None]
) -> str:
    """Measure and return a recipe fragment with the fastest values (`launch.tuning.recipe_fragment`).

    Args:
        recipe: of the training. Options that it gives are not tried.
        ranks: that training will have on this machine: measured is one of them, with its share of the cores and of
            the global batch.
        seconds: approximate duration of each part; every value is measured at least once.
        command: command line, for the fragment.
        say: receives lines about progress.

    Raises:
        UserError: recipe and data do not fit together, or the set is damaged.
    """
    with one_rank(recipe, ranks=ranks) as (feed, _):
        world, shape, data = feed.world, feed.shape, recipe.data
        zero, precision = zero_and_precision(recipe.parallel, world.device, ranks=ranks)
        found: dict[str, Choice] = {}
        if "model" in targets:
            found |= tune_model(feed, ranks=ranks, seconds=seconds, say=say)
        if "input" in targets:
            dtype = torch.bfloat16 if precision == "bf16" else torch.float32
            found |= tune_loader(feed, dtype=dtype, seconds=seconds, say=say)
        conditions = (
            f"command: {command}",
            f"device: {device_name(world.device)}, {world.cores} cores per rank",
            f"versions: {', '.join(f'{name} {version}' for name, version in versions().items() if version)}",
            f"measured on {date.today()}: fat_{recipe.model.variant}, {shape.micro_rows} images of {data.size} pixels "
            f"per forward pass, {shape.accumulation} forward passes per step, rank 0 of {ranks}, {precision}, "
            f"ZeRO {zero}",
        )
        return recipe_fragment(found, conditions)

"""`pipeline tune`: measure a recipe's unset performance options in one process."""

from __future__ import annotations

from collections.abc import Sequence
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
from shards.progress import Phases

Target = Literal["model", "input"]
TARGETS: tuple[Target, ...] = ("model", "input")


def tune(
    recipe: Recipe, targets: Sequence[Target], *, ranks: int, seconds: float, command: str, progress: Phases
) -> str:
    """Measure a recipe's unset options, and return a recipe fragment with the fastest values.

    Args:
        recipe: recipe of the training. Options that it sets are not measured.
        targets: what to measure: the model, the input pipeline, or both.
        ranks: number of ranks that training will have on this machine. The measurement uses the CPU cores and the
            micro-batch of one of them.
        seconds: approximate duration per target; every value is measured at least once.
        command: command line to record in the fragment.
        progress: shows each measurement, and the result of each option.

    Raises:
        UserError: the recipe and the data are inconsistent, or the set is damaged.
    """
    progress.begin("opening the set, checking the kernels")
    with one_rank(recipe, ranks=ranks) as (feed, _):
        world, shape, data = feed.world, feed.shape, recipe.data
        zero, precision = zero_and_precision(recipe.parallel, world.device, ranks=ranks)
        found: dict[str, Choice] = {}
        if "model" in targets:
            found |= tune_model(feed, ranks=ranks, seconds=seconds, progress=progress)
        if "input" in targets:
            dtype = torch.bfloat16 if precision == "bf16" else torch.float32
            found |= tune_loader(feed, recipe.data.loader, dtype=dtype, seconds=seconds, progress=progress)
        conditions = (
            f"command: {command}",
            f"device: {device_name(world.device)}, {world.cores} cores per rank",
            f"versions: {', '.join(f'{name} {version}' for name, version in versions().items() if version)}",
            f"measured on {date.today()}: {recipe.model.spec}, {shape.micro_rows} images of {data.size} pixels "
            f"per forward pass, {shape.accumulation} forward passes per step, rank 0 of {ranks}, {precision}, "
            f"ZeRO {zero}",
        )
        return recipe_fragment(found, conditions)

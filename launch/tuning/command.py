"""Measure the performance options that a recipe leaves open, in one process: `pipeline tune`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import date
from typing import Literal

import torch

from launch.config.recipe import Recipe
from launch.engine.build import build_model
from launch.engine.execution import Execution, alternatives, zero_and_precision
from launch.engine.kernel_check import check_recipe
from launch.engine.memory import check_batches_fit
from launch.feed import Feed, feed_of_one_rank
from launch.machine.provenance import device_name, versions
from launch.machine.world import connect, disconnect
from launch.tuning.fragment import fragment
from launch.tuning.loader import tune as tune_loader
from launch.tuning.model import Bench
from launch.tuning.model import tune as tune_model
from launch.tuning.trials import Choice

Part = Literal["model", "input"]
PARTS: tuple[Part, ...] = ("model", "input")


def tune(
    recipe: Recipe, parts: Sequence[Part], *, ranks: int, seconds: float, command: str, say: Callable[[str], None]
) -> str:
    """Measure and return a recipe fragment with the fastest values (`launch.tuning.fragment`).

    Args:
        recipe: of the training. Options that it gives are not tried.
        ranks: that training will have on this machine: measured is one of them, with its share of the cores, of the
            global batch and, under ZeRO, of the optimizer's work.
        seconds: approximate duration of each part, without compilation.
        command: command line, for the fragment.
        say: receives lines about progress.

    Raises:
        UserError: recipe and data do not fit together, or the set is damaged.
    """
    world = connect(numa_binding=recipe.parallel.numa_binding, local_size=ranks)
    try:
        feed = feed_of_one_rank(recipe, world, ranks=ranks)
        check_batches_fit(feed)
        model = build_model(recipe, feed.classes)
        check_recipe(recipe, feed, model)  # compiles kernels, which the measurements shall not include
        zero, precision = zero_and_precision(recipe.parallel, world.device, ranks=ranks)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        found: dict[str, Choice] = {}
        if "model" in parts:
            side, shares = recipe.data.size, ranks if zero else 0
            images = torch.randn((feed.shape.micro_rows, 3, side, side), device=world.device, dtype=dtype)
            images = images.contiguous(memory_format=torch.channels_last)
            bench = Bench(model.to(world.device), images, bf16=precision == "bf16", optim=recipe.optim, shares=shares)
            found |= tune_model(bench, *_open_options(recipe, feed, ranks=ranks), seconds=seconds, say=say)
        if "input" in parts:
            found |= tune_loader(feed, dtype=dtype, seconds=seconds, say=say)
        shape, data = feed.shape, recipe.data
        conditions = (
            f"command: {command}",
            f"device: {device_name(world.device)}, {world.cores} cores per rank",
            f"versions: {', '.join(f'{name} {version}' for name, version in versions().items() if version)}",
            f"measured on {date.today()}: fat_{recipe.model.variant}, {shape.micro_rows} images of {data.size} pixels "
            f"per forward pass, {shape.accumulation} forward passes per step, rank 0 of {ranks}, {precision}, "
            f"ZeRO {zero}",
        )
        return fragment(found, conditions)
    finally:
        disconnect()


def _open_options(recipe: Recipe, feed: Feed, *, ranks: int) -> tuple[Execution, dict[str, tuple[str, ...]]]:
    """What the recipe's [compile] amounts to, and the values to try of the options that it leaves open."""
    device, accumulation = feed.world.device, feed.shape.accumulation
    start = Execution.of(recipe, device, accumulation=accumulation, ranks=ranks)
    zero, _ = zero_and_precision(recipe.parallel, device, ranks=ranks)
    options = alternatives(device, zero=zero, accumulation=accumulation, ranks=ranks)
    # $FAT_KERNELS may give a value too.
    given = {n for n, v in options.items() if getattr(recipe.compile, n) is not None or getattr(start, n) != v[0]}
    return start, {name: values for name, values in options.items() if name not in given}

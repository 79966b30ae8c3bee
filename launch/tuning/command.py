"""`pipeline tune`: measure how model and loader run fastest on this machine, and keep it for every run to come."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import nn

from launch.config.recipe import Recipe
from launch.engine.build import build_model
from launch.engine.execution import Execution, alternatives, choose
from launch.engine.kernel_check import check_recipe
from launch.engine.memory import check_batches_fit
from launch.engine.optimizers import OPTIMIZERS
from launch.feed import Feed
from launch.machine.world import connect, disconnect
from launch.tuning import loader as input_tuning
from launch.tuning import model as tuning
from launch.tuning.open_options import given, with_values
from launch.tuning.trials import Choice, Value
from shards.files.temporary import prepare_caches

Part = Literal["model", "input"]
PARTS: tuple[Part, ...] = ("model", "input")


def tune(
    recipe: Recipe, parts: tuple[Part, ...], *, ranks: int, seconds: float, say: Callable[[str], None]
) -> dict[str, Value]:
    """Measure in this process alone; returns the chosen values, by the names of the options.

    Args:
        recipe: what will be trained, with the rows of one rank as its global batch.
        ranks: processes that training will have on this machine: this one takes its share of the cores and, under ZeRO,
            of the optimiser's work.
        seconds: about what each part may take, if nothing is compiled.
        say: is told what was found, line by line.

    Raises:
        UserError: recipe and data do not fit together, or the file cannot be written.
    """
    prepare_caches()
    os.environ["LOCAL_WORLD_SIZE"] = str(ranks)
    world = connect()
    try:
        feed = Feed.of(recipe, world)
        check_batches_fit(feed)
        check_recipe(recipe, feed, build_model(recipe, feed.classes))  # compiles kernels outside the time that is given
        fixed, chosen = given(recipe), dict[str, Value]()
        for part in parts:
            model = build_model(recipe, feed.classes)
            found = measure(part, recipe, feed, model, fixed=fixed, ranks=ranks, seconds=seconds, say=say)
            chosen |= {name: choice.value for name, choice in found.items()}
        with_values(recipe, chosen)  # the options' own checks
        return chosen
    finally:
        disconnect()


def measure(
    part: Part,
    recipe: Recipe,
    feed: Feed,
    model: nn.Module,
    *,
    fixed: Mapping[str, Value | None],
    ranks: int,
    seconds: float,
    say: Callable[[str], None],
) -> dict[str, Choice]:
    """Time what is open of a part, on this rank alone; see `launch.tuning.model` and `launch.tuning.loader`.

    Args:
        fixed: options which stay as they are; None = at the default.
        ranks: of the training.

    Raises:
        UserError: the recipe cannot be, or the set is damaged.
    """
    zero, precision = choose(recipe.parallel, feed.world.device, ranks=ranks)
    settled = with_values(recipe, fixed)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    if part == "input":
        return input_tuning.tune(feed.with_recipe(settled), fixed, dtype=dtype, seconds=seconds, say=say)
    device, accumulation, optim = feed.world.device, feed.shape.accumulation, recipe.optim
    shape = (feed.shape.micro_rows, 3, recipe.data.size, recipe.data.size)

    def images() -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)

    bench = tuning.Bench(
        model.to(device),
        images,
        bf16=precision == "bf16",
        optimizer=OPTIMIZERS[optim.optimizer],
        betas=optim.betas,
        eps=optim.eps,
        shares=ranks if zero else 0,
    )
    possible = alternatives(device, zero=zero, accumulation=accumulation, ranks=ranks)
    still_open = {name: values for name, values in possible.items() if name not in fixed}
    start = Execution.of(
        settled.compile,
        settled.parallel,
        device,
        accumulation=accumulation,
        ranks=ranks,
        freeze_bn=settled.model.freeze_bn,
    )
    return tuning.tune(bench, start, still_open, seconds=seconds, say=say)

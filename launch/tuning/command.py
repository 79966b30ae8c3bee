"""`pipeline tune`: measure how model and loader run fastest on this machine, and keep it for every run to come."""

from __future__ import annotations

import os
from collections.abc import Callable

from launch.config.recipe import Recipe
from launch.engine.build import build_model
from launch.engine.kernel_check import check_recipe
from launch.engine.memory import check_batches_fit
from launch.feed import Feed
from launch.machine.world import connect, disconnect
from launch.tuning import tuned
from launch.tuning.choices import measure
from launch.tuning.open_options import given, with_values
from launch.tuning.trials import Value
from launch.tuning.tuned import Part
from shards.files.temporary import prepare_caches


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
    prepare_caches()  # the file is in one of them
    file = tuned.file_of(recipe.run.tuned)
    if file is not None:
        tuned.check_place(file)
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
            if file is not None and found:
                key = tuned.key_of(part, recipe, feed, given=fixed, ranks=ranks)
                tuned.keep(file, tuned.entry_of(part, key, found))
        with_values(recipe, chosen)  # the options' own checks
        if file is not None and chosen:
            # 'pipeline bench' is one process, without accumulation.
            worth = ", 'pipeline bench' shows what it is worth" if ranks == feed.shape.accumulation == 1 else ""
            say(f"kept in {file}; launch/train.py takes it from there{worth}")
        return chosen
    finally:
        disconnect()

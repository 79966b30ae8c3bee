"""Setup of a single process that does the work of one of several ranks, for measurements."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from launch.config.recipe import Recipe
from launch.engine.build import build_model
from launch.engine.execution import Execution, zero_and_precision
from launch.engine.kernel_check import KernelCheckResult, check_training_kernels
from launch.engine.memory import check_batches_fit
from launch.feed import Feed
from launch.jpeg_decoder import choose_jpeg_decoder
from launch.machine.world import connect, disconnect
from shards.redact import printable

EPOCHS = 1_000_000  # enough epochs for any measurement, even on a small set


@contextmanager
def one_rank(recipe: Recipe, *, ranks: int) -> Iterator[tuple[Feed, KernelCheckResult]]:
    """Check a recipe as training on `ranks` ranks of this machine would, and yield the feed of rank 0 for this process.

    The feed's world is this process alone, with the CPU cores that one of `ranks` ranks would have. The feed's recipe
    has the ZeRO stage of training on `ranks` ranks, and enough epochs for any measurement. It has no size schedule: all
    images have --size.

    Yields:
        (feed, verdict of the kernels' self-check).

    Raises:
        UserError: the recipe, the data and the number of ranks are inconsistent.
    """
    world = connect(numa_binding=recipe.parallel.numa_binding, local_size=ranks)
    if recipe.data.size_schedule is not None:
        print(f"--size-schedule: images of --size {recipe.data.size} are measured", file=sys.stderr)
        recipe = replace(recipe, data=recipe.data.at_one_size())
    try:
        feed = replace(Feed.of(recipe, replace(world, size=ranks)), world=world)
        check_batches_fit(feed)
        Execution.of(recipe, world.device, accumulation=feed.shape.accumulation, ranks=ranks)
        # The self-check compiles the kernels, which must not happen during the measurements.
        verdict = check_training_kernels(recipe, feed, build_model(recipe, feed.classes))
        zero, _ = zero_and_precision(recipe.parallel, world.device, ranks=ranks)
        parallel, optim = replace(recipe.parallel, zero=zero), replace(recipe.optim, epochs=EPOCHS)
        recipe = replace(recipe, parallel=parallel, optim=optim)
        feed, messages = choose_jpeg_decoder(feed.with_recipe(recipe), previous=None)
        for message in messages:
            print(printable(message), file=sys.stderr)
        yield feed, verdict
    finally:
        disconnect()

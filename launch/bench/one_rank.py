"""Set up one of several ranks in a process of its own, to measure what it does."""

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

ENDLESS = 1_000_000  # epochs: no measurement reaches the end of a small set


@contextmanager
def one_rank(recipe: Recipe, *, ranks: int) -> Iterator[tuple[Feed, KernelCheckResult]]:
    """Check the recipe as training on `ranks` ranks of this machine would; yields what rank 0 of them is fed.

    The world of the feed is this process alone, with the rank's share of the cores. Its recipe has the ZeRO stage of so
    many ranks, and goes on for more epochs than any measurement takes.

    Raises:
        UserError: recipe, data and ranks do not fit together.
    """
    world = connect(numa_binding=recipe.parallel.numa_binding, local_size=ranks)
    try:
        feed = replace(Feed.of(recipe, replace(world, size=ranks)), world=world)
        check_batches_fit(feed)
        Execution.of(recipe, world.device, accumulation=feed.shape.accumulation, ranks=ranks)
        # Compiles kernels, which measurements shall not include.
        verdict = check_training_kernels(recipe, feed, build_model(recipe, feed.classes))
        zero, _ = zero_and_precision(recipe.parallel, world.device, ranks=ranks)
        parallel, optim = replace(recipe.parallel, zero=zero), replace(recipe.optim, epochs=ENDLESS)
        recipe = replace(recipe, parallel=parallel, optim=optim)
        feed, messages = choose_jpeg_decoder(feed.with_recipe(recipe), previous=None)
        for message in messages:
            print(printable(message), file=sys.stderr)
        yield feed, verdict
    finally:
        disconnect()

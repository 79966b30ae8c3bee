"""Measure which options of the loader are fastest: threads, batches ahead, decoder hints, on the real shard set.

One option after the other, each with the best values of those before it.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch

from launch.feed import Feed
from launch.jpeg_decoder import decodes_on_gpu
from launch.machine.device_peaks import synchronize
from launch.tuning.trials import Choice, choose
from pipeline.decode.choose import chosen_loader

ROUNDS = 2
MARGIN = 1.05  # loaders vary more than models
FEWEST_BATCHES = 3
ENDLESS = 1_000_000  # epochs: no trial reaches the end of a small set
PLACES = 16  # of the set, at which trials begin
# Decoder buffers are allocated for images of this quantile of the set; few are larger.
LARGE = 0.99


def tune(feed: Feed, *, dtype: torch.dtype, seconds: float, say: Callable[[str], None]) -> dict[str, Choice]:
    """Choose the options that the recipe leaves open (None); returns a choice for each.

    Args:
        dtype: of the batches.
        seconds: approximate duration.
        say: receives a line before each turn, and one with each result.

    Raises:
        ShardSetError: the set is damaged.
    """
    loader = feed.recipe.data.loader
    given = {name for name, value in (vars(loader) | vars(loader.dali)).items() if value is not None}
    stages = [stage for stage in _stages(feed) if not given & stage[0].keys()]
    each = seconds / (1 + ROUNDS * sum(len(stage) for stage in stages))
    until, turns, found = time.monotonic() + seconds, itertools.count(), dict[str, Choice]()

    def measured(values: Mapping[str, int]) -> float:
        return rate(with_options(feed, values), next(turns), dtype=dtype, seconds=each)

    if stages:
        measured({})  # opens files, compiles what is compiled at first use
    for stage in stages:
        name = ", ".join(option.replace("_", "-") for option in stage[0])
        best = choose(name, stage, measured, rounds=ROUNDS, until=until, say=say, margin=MARGIN, shown=_shown)
        feed = with_options(feed, best.value or {})
        found |= {option: Choice(best.value and best.value[option], best.reason) for option in stage[0]}
    return found


def rate(feed: Feed, number: int, *, dtype: torch.dtype, seconds: float) -> float:
    """Return images per second of the loader alone, in its steady state.

    Args:
        number: of the trial: each reads another place of the set, so that none profits from what others have read.
        seconds: approximate duration, half of it to fill the queues.
    """
    device, rows, steps = feed.world.device, feed.shape.micro_rows, feed.plan.steps_per_epoch
    start = number * max(1, steps // PLACES) % steps
    feed = feed.with_recipe(replace(feed.recipe, optim=replace(feed.recipe.optim, epochs=ENDLESS)))
    begun = time.monotonic()
    with feed.train_loader(step=start, dtype=dtype) as loader:
        next(loader)
        for _ in range(feed.loader_options.settings.ahead):
            if time.monotonic() - begun > seconds / 2:
                break
            next(loader)
        synchronize(device)
        taken, from_here = 0, time.perf_counter()
        while taken < FEWEST_BATCHES or time.monotonic() - begun < seconds:
            next(loader)
            taken += 1
        synchronize(device)
        return taken * rows / (time.perf_counter() - from_here)


def with_options(feed: Feed, values: Mapping[str, int]) -> Feed:
    """Return the feed with other values of `LoaderOptions` and `DaliOptions`."""
    dali = feed.recipe.data.loader.dali
    of_dali = {name: value for name, value in values.items() if hasattr(dali, name)}
    others = {name: value for name, value in values.items() if name not in of_dali}
    return feed.with_loader(**others, dali=replace(dali, **of_dali))


def _stages(feed: Feed) -> list[list[dict[str, int]]]:
    """Per option, or options that go together, the values to try; the default first."""
    settings, cores = replace(feed.loader_options, decode_threads=None).settings, feed.world.cores
    if chosen_loader(feed.recipe.data.loader, feed.dataset.split("train")) == "synthetic":
        return []
    stages = [
        [{"decode_threads": n} for n in dict.fromkeys((cores, max(1, cores // 2), 2 * cores))],
        [{"read_threads": n} for n in (settings.read_threads, 8, 64)],
        [{"decode_ahead": n} for n in (settings.decode_ahead, 1, 4)],
        [{"read_ahead": n} for n in (settings.read_ahead, 8)],
    ]
    if decodes_on_gpu(feed):
        index = feed.dataset.index("train")
        large = {f"preallocate_{side}": math.ceil(np.quantile(index[side], LARGE)) for side in ("width", "height")}
        stages.append([dict.fromkeys(large, 0), large])
    return stages


def _shown(values: Mapping[str, int]) -> str:
    return " x ".join(map(str, values.values()))

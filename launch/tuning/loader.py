"""How the loader is fastest here: threads, batches ahead, decoder hints, measured with the real one on the real set.

One option after the other, its values in turns, each with the best of the options before it.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

import numpy as np
import torch

from launch.feed import Feed
from launch.jpeg_decoder import decodes_on_gpu
from launch.machine.device_peaks import settle
from launch.tuning.open_options import option_name, with_values
from launch.tuning.trials import Choice, Value, best_of, decided, take_turns
from pipeline.decode.choose import chosen_loader
from shards.errors import ShardSetError

ROUNDS = 2
MARGIN = 1.05  # loaders vary more than models
FEWEST_BATCHES = 3
ENDLESS = 1_000_000  # epochs: no trial comes to the end of a small set
PLACES = 16  # of the set, at which trials begin
# Decoder buffers are made for images of this quantile of the set, which few outgrow.
LARGE = 0.99


def tune(
    feed: Feed,
    given: Mapping[str, Value | None],
    *,
    dtype: torch.dtype,
    seconds: float,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Choice]:
    """Choose how the loader works; returns the choice per option (decoder hints are two), without those that there was
    no time for.

    Args:
        feed: with the loader's options as they are given, the others open.
        given: by name, what may not be changed.
        seconds: about what it may take.
        say: is told each turn before it begins, and what was found, line by line.
    """
    stages = [stage for stage in _stages(feed) if not any(name in given for name in stage[0])]
    each = seconds / (1 + ROUNDS * sum(len(stage) for stage in stages))
    until, turns, chosen = time.monotonic() + seconds, itertools.count(), dict[str, Choice]()

    def measured(changes: dict[str, Value]) -> float:
        values = {name: choice.value for name, choice in chosen.items()} | changes
        return rate(feed.with_recipe(with_values(feed.recipe, values)), next(turns), dtype=dtype, seconds=each)

    if stages:
        measured({})  # opens files, compiles what is compiled at first use
    for stage in stages:
        names = ", ".join(map(option_name, stage[0]))

        def announce(changes: dict[str, Value], turn: str, names: str = names) -> None:
            say(f"trying {names} {_shown(changes)}, {turn}")

        # What is wrong with the set, no option mends.
        trials = take_turns(stage, measured, rounds=ROUNDS, until=until, passed_on=ShardSetError, announce=announce)
        best = best_of(trials, margin=MARGIN, shown=_shown)
        if not decided(trials):  # kept, it would never be measured again
            say(f"{names}: left open ({best.reason})")
            continue
        say(f"{names}: {_shown(best.value)} ({best.reason})")
        chosen |= {name: Choice(value, best.reason) for name, value in best.value.items()}
    return chosen


def possible(feed: Feed, given: Collection[str]) -> list[str]:
    """The options that `tune` would try, but for those that are given."""
    stages = [stage[0] for stage in _stages(feed)]
    return [name for stage in stages if not any(name in given for name in stage) for name in stage]


def rate(feed: Feed, number: int, *, dtype: torch.dtype, seconds: float) -> float:
    """Images per second of the loader alone, when its queues have come to where they stay.

    Args:
        number: of the trial: each reads another place of the set, so that none gains by what others have read.
        seconds: about what it may take, half of them to fill the queues.
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
        settle(device)
        taken, from_here = 0, time.perf_counter()
        while taken < FEWEST_BATCHES or time.monotonic() - begun < seconds:
            next(loader)
            taken += 1
        settle(device)
        return taken * rows / (time.perf_counter() - from_here)


def _stages(feed: Feed) -> list[list[dict[str, Value]]]:
    """Per option, or options that go together, the values to try; the default first."""
    settings, cores = replace(feed.loader_options, decode_threads=None).settings, feed.world.cores
    stages: list[list[dict[str, Value]]] = [
        [{"decode_threads": n} for n in dict.fromkeys((cores, max(1, cores // 2), 2 * cores))],
        [{"read_threads": n} for n in (settings.read_threads, 8, 64)],
        [{"decode_ahead": n} for n in (settings.decode_ahead, 1, 4)],
        [{"read_ahead": n} for n in (settings.read_ahead, 8)],
    ]
    loader = chosen_loader(feed.recipe.data.loader, feed.dataset.split("train"))
    if decodes_on_gpu(feed):
        index = feed.dataset.index("train")
        large = {side: math.ceil(np.quantile(index[side], LARGE)) for side in ("width", "height")}
        hints: dict[str, Value] = {f"preallocate_{side}": pixels for side, pixels in large.items()}
        stages.append([dict.fromkeys(hints, 0), hints])
    return [] if loader == "synthetic" else stages


def _shown(changes: Mapping[str, Value]) -> str:
    return " x ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in changes.values())

"""Measurement of the fastest loader options on the real shard set: threads, batches ahead, decoders and their hints."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import numpy as np
import torch

from launch.bench.decode_paths import with_loader_options
from launch.feed import Feed
from launch.jpeg_decoder import decodes_on_gpu
from launch.machine.device_peaks import synchronize
from launch.tuning.trials import Choice, Values, tune
from pipeline.decode.choose import resolve_loader
from pipeline.options import DecodePath, LoaderOptions
from shards.progress import Phases

ROUNDS = 2
MARGIN = 1.05  # larger than the margin for models, because loader timings vary more
MIN_BATCHES = 3
STARTING_POINTS = 16  # number of positions in an epoch at which trials begin
# Decoder buffers are preallocated for this quantile of the image widths and heights in the set.
LARGE = 0.99


def tune_loader(
    feed: Feed, requested: LoaderOptions, *, dtype: torch.dtype, seconds: float, progress: Phases
) -> dict[str, Choice]:
    """Choose values for the unset options of [data.loader]; see `launch.tuning.trials.tune`.

    Args:
        feed: feed of one rank, from `launch.bench.one_rank`, which has chosen the decoders.
        requested: options of the command line, with None for those to measure.
        dtype: dtype of the batches.
    """
    given = {name for name, value in (vars(requested) | vars(requested.dali)).items() if value is not None}
    stages = [stage for stage in candidates(feed) if not given & stage[0].keys()]
    shares = decodes_on_gpu(feed) and "cpu_decode" not in given
    each = seconds / (1 + 2 * shares + ROUNDS * (2 * shares + sum(len(stage) for stage in stages)))
    turns = itertools.count()

    def measure(values: Values) -> float:
        return rate(with_loader_options(feed, values), next(turns), dtype=dtype, seconds=each)

    if stages or shares:
        progress.begin("warming up the loader")
        measure({})  # warm-up: opens files, and compiles functions on first use
    if shares:
        stages.append(cpu_shares(measure, progress))
    return tune(stages, measure, rounds=ROUNDS, margin=MARGIN, seconds=seconds, progress=progress)


def cpu_shares(measure: Callable[[Values], float], progress: Phases) -> list[Values]:
    """Measure decoding on the GPU alone and on the CPU alone, and return the values of `cpu_decode` to try.

    If the decoders do not slow each other down, both work all the time if the CPU gets the fraction cpu / (cpu + gpu)
    of the images, for rates cpu and gpu in images per second.
    """
    progress.begin("decoding on the GPU alone")
    gpu = measure({"cpu_decode": 0.0})
    progress.begin("decoding on the CPU alone")
    cpu = measure({"cpu_decode": 1.0})
    fraction = round(cpu / (cpu + gpu), 2)
    progress.note(f"decoding: GPU {gpu:,.4g} images/s, CPU {cpu:,.4g} images/s, so trying cpu-decode {fraction}")
    return [{"cpu_decode": value} for value in dict.fromkeys((0.0, fraction))]


def rate(feed: Feed, number: int, *, dtype: torch.dtype, seconds: float) -> float:
    """Measure the images per second of the loader alone, in its steady state.

    Args:
        number: number of the trial. Each trial starts at another position of the epoch, so that none benefits from
            samples that earlier trials brought into the page cache.
        dtype: dtype of the batches.
        seconds: approximate duration; up to half of it fills the queues.
    """
    device, rows, steps = feed.world.device, feed.shape.micro_rows, feed.plan.steps_per_epoch
    start = number * max(1, steps // STARTING_POINTS) % steps
    begun = time.monotonic()
    with feed.train_loader(step=start, dtype=dtype) as loader:
        next(loader)
        for _ in range(feed.loader_options.settings.ahead):
            if time.monotonic() - begun > seconds / 2:
                break
            next(loader)
        synchronize(device)
        batches, timed_from = 0, time.perf_counter()
        while batches < MIN_BATCHES or time.monotonic() - begun < seconds:
            next(loader)
            batches += 1
        synchronize(device)
        return batches * rows / (time.perf_counter() - timed_from)


def candidates(feed: Feed) -> list[list[Values]]:
    """Return the values to try, the default first, for each option or group of options."""
    settings, cores = replace(feed.loader_options, decode_threads=None).settings, feed.world.cores
    if resolve_loader(feed.recipe.data.loader, feed.dataset.split("train")) == "synthetic":
        return []
    stages: list[list[Values]] = [
        [{"decode_threads": n} for n in dict.fromkeys((cores, max(1, cores // 2), 2 * cores))],
        [{"read_threads": n} for n in (settings.read_threads, 8, 64)],
        [{"decode_ahead": n} for n in (settings.decode_ahead, 1, 4)],
        [{"read_ahead": n} for n in (settings.read_ahead, 8)],
    ]
    if decodes_on_gpu(feed):
        # The first values are those that `launch.jpeg_decoder` has chosen.
        if settings.hw_decoder_load > 0:
            stages.append([{"hw_decoder_load": n} for n in dict.fromkeys((settings.hw_decoder_load, 1.0, 0.8))])
        if not settings.gpu_cache:
            stages.append([{"decode": path} for path in dict.fromkeys((settings.decode, *get_args(DecodePath)))])
        index = feed.dataset.index("train")
        large = {f"preallocate_{side}": math.ceil(np.quantile(index[side], LARGE)) for side in ("width", "height")}
        stages.append([dict.fromkeys(large, 0), large])
    return stages

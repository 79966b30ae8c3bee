"""Timing of a loader alone, of a training step alone, and of both together, in alternating rounds."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

from launch.bench.verdict import Phase
from launch.engine.engine import Engine
from launch.feed import Feed
from launch.machine.device_peaks import synchronize
from pipeline.batch import Batch, timed_event
from pipeline.data_wait import DataWait
from pipeline.options import DaliOptions

# A loader that is this many times as fast as the model alone keeps its queues full during training too.
CLEARLY_FASTER = 2.0
# An idle GPU takes a while to reach its steady clock: run groups of untimed steps until the rate of a group differs
# from that of the previous group by at most WARMUP_TOLERANCE.
WARMUP_STEPS, MAX_WARMUP_GROUPS, WARMUP_TOLERANCE = 3, 8, 0.02
OpenLoader = Callable[[], AbstractContextManager[Iterator[Batch]]]
Step = Callable[[Batch], object]
"""Function that does one optimizer step on a batch."""


def training_step(feed: Feed, engine: Engine, *, accumulation: int = 1) -> Step:
    """Return an engine's optimizer step, which uses the same batch for every micro-batch."""
    numbers, (rate, _, _) = itertools.count(), feed.recipe.optim.rates(feed.plan.global_batch)
    return lambda batch: engine.step([batch] * accumulation, step=next(numbers), lr=rate)


def resident_batches(feed: Feed, engine: Engine) -> OpenLoader:
    """Return a function that opens an iterator over batches that are already on the device."""
    without_caches: dict[str, Any] = {"memory_cache": 0.0, "memory_cache_short_side": None, "dali": DaliOptions()}
    synthetic = feed.with_loader(loader="synthetic", **without_caches)
    return lambda: synthetic.train_loader(step=0, dtype=engine.input_dtype)


def compare(
    loader: OpenLoader,
    resident: OpenLoader,
    step: Step,
    *,
    batch: int,
    steps: int,
    ahead: int,
    device: torch.device,
    rounds: int,
    begin: Callable[[str], None] = lambda _: None,
) -> tuple[Phase, Phase, Phase]:
    """Measure (loader alone, model alone, both together): medians over rounds that measure each of them once.

    Args:
        loader: opens a new loader.
        resident: opens an iterator over batches that are already on the device.
        batch: images per batch.
        steps: timed batches per measurement.
        ahead: number of batches that the loader holds when its queues are full.
        rounds: number of rounds.
        begin: receives a description of each measurement before it.
    """
    turns: list[tuple[Phase, Phase, Phase]] = []
    for number in range(1, rounds + 1):
        turn = f"round {number} of {rounds}"
        begin(f"loader alone, {turn}")
        with loader() as batches:
            for _ in range(ahead):
                next(batches)
            alone = run(batches, None, steps=steps, batch=batch, device=device)
        begin(f"model alone, {turn}")
        model = model_alone(resident, step, steps=steps, batch=batch, device=device)
        begin(f"loader and model together, {turn}")
        with loader() as batches:
            step(next(batches))
            # Reach a steady state: wait until the queues are full if the loader is fast enough to keep them so, else
            # train until their fill level is stable.
            if alone.rate > CLEARLY_FASTER * model.rate:
                time.sleep(ahead * batch / alone.rate)
            else:
                for _ in range(ahead):
                    step(next(batches))
            _reach_steady_rate(batches, step, batch=batch, device=device)
            turns.append((alone, model, run(batches, step, steps=steps, batch=batch, device=device)))
    alone, model, both = (_median([turn[which] for turn in turns]) for which in range(3))
    return alone, model, both


def model_alone(resident: OpenLoader, step: Step, *, steps: int, batch: int, device: torch.device) -> Phase:
    """Time training steps on batches that are already on the device."""
    with resident() as batches:
        step(next(batches))  # an untimed step, which allocates memory and compiles
        _reach_steady_rate(batches, step, batch=batch, device=device)
        return run(batches, step, steps=steps, batch=batch, device=device)


def run(batches: Iterator[Batch], step: Step | None, *, steps: int, batch: int, device: torch.device) -> Phase:
    """Time `steps` batches; if `step` is None, they are loaded but not trained on."""
    synchronize(device)
    # Without training steps the device is idle anyway: measure how long the host waits.
    wait = DataWait(device if step is not None else torch.device("cpu"))
    launch_times, marks = list[float](), [timed_event(device)]
    start, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        (taken,) = wait.next_batches(batches)
        if step is not None:
            launched_at = time.perf_counter()
            step(taken)
            launch_times.append(time.perf_counter() - launched_at)
            wait.mark_step_end()
            marks.append(timed_event(device))
    cpu = time.process_time() - cpu  # CPU time before synchronizing, which keeps a core busy
    synchronize(device)
    seconds, images = time.perf_counter() - start, steps * batch
    on_gpu = [mark for mark in marks if mark is not None]
    return Phase(
        rate=images / seconds,
        cpu=cpu / images,
        waiting=wait.seconds() / seconds,
        # Lower quartile, not the median, of the launch times: a launch waits while the device's queue is full.
        host=sorted(launch_times)[len(launch_times) // 4] if len(on_gpu) > 1 else 0.0,
        times=tuple(round(before.elapsed_time(after), 2) for before, after in itertools.pairwise(on_gpu)),
    )


def _reach_steady_rate(batches: Iterator[Batch], step: Step, *, batch: int, device: torch.device) -> None:
    """Run untimed steps until a GPU's rate is steady. Does nothing on a CPU, whose steps take seconds."""
    before = 0.0
    for _ in range(MAX_WARMUP_GROUPS if device.type == "cuda" else 0):
        rate = run(batches, step, steps=WARMUP_STEPS, batch=batch, device=device).rate
        if abs(rate - before) <= WARMUP_TOLERANCE * before:
            return
        before = rate


def _median(phases: list[Phase]) -> Phase:
    names = [field.name for field in dataclasses.fields(Phase) if field.name != "times"]
    medians = {name: statistics.median(getattr(phase, name) for phase in phases) for name in names}
    return Phase(**medians, times=tuple(itertools.chain.from_iterable(phase.times for phase in phases)))


def predict(loader: Phase, model: Phase, *, cores: int | None) -> float:
    """Predict the images/s of loader and model together: those of the slower one, limited by CPU time on shared cores.

    Args:
        cores: number of CPU cores that loader and model share; None: the model runs on a GPU.
    """
    seconds = max(1 / loader.rate, 1 / model.rate)
    return 1 / (max(seconds, (loader.cpu + model.cpu) / cores) if cores else seconds)

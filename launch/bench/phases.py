"""Time a loader alone, a training step alone, and both together, in turns."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch

from launch.bench.verdict import Phase
from launch.engine.engine import Engine
from launch.feed import Feed
from launch.machine.device_peaks import synchronize
from pipeline.batch import Batch, timed_event
from pipeline.data_wait import DataWait

CLEARLY = 2.0  # times as fast alone: as fast too where both share a machine
# A GPU that was idle takes its time to reach the speed that it holds: steps that are not timed, until some take as
# long as those before.
STRETCH, MOST_STRETCHES, STEADY = 3, 8, 0.02
OpenLoader = Callable[[], AbstractContextManager[Iterator[Batch]]]
Step = Callable[[Batch], object]
"""Trains on a batch."""


def training_step(feed: Feed, engine: Engine, *, accumulation: int = 1) -> Step:
    """Return the optimizer step of an engine, whose micro-batches are all the same batch."""
    numbers, (rate, _, _) = itertools.count(), feed.recipe.optim.rates(feed.plan.global_batch)
    return lambda batch: engine.step([batch] * accumulation, step=next(numbers), lr=rate)


def resident_batches(feed: Feed, engine: Engine) -> OpenLoader:
    """Return an opener of batches that are on the device already."""
    return lambda: feed.with_loader(loader="synthetic").train_loader(step=0, dtype=engine.input_dtype)


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
) -> tuple[Phase, Phase, Phase]:
    """(loader alone, model alone, both): medians of rounds in which each has its turn.

    Args:
        loader: opens the loader afresh.
        resident: opens batches that are on the device already.
        batch, ahead: images of a batch, and batches that the loader holds when it has run as far ahead as it can.
    """
    turns: list[tuple[Phase, Phase, Phase]] = []
    for _ in range(rounds):
        with loader() as batches:
            for _ in range(ahead):
                next(batches)
            alone = run(batches, None, steps=steps, batch=batch, device=device)
        model = model_alone(resident, step, steps=steps, batch=batch, device=device)
        with loader() as batches:
            step(next(batches))
            # To a steady state: queues that surely run full beside the model may do so at once; any other find theirs.
            if alone.rate > CLEARLY * model.rate:
                time.sleep(ahead * batch / alone.rate)
            else:
                for _ in range(ahead):
                    step(next(batches))
            _reach_steady_rate(batches, step, batch=batch, device=device)
            turns.append((alone, model, run(batches, step, steps=steps, batch=batch, device=device)))
    alone, model, both = (_median([turn[which] for turn in turns]) for which in range(3))
    return alone, model, both


def model_alone(resident: OpenLoader, step: Step, *, steps: int, batch: int, device: torch.device) -> Phase:
    """Time training steps on batches that are on the device already."""
    with resident() as batches:
        step(next(batches))  # allocates, compiles
        _reach_steady_rate(batches, step, batch=batch, device=device)
        return run(batches, step, steps=steps, batch=batch, device=device)


def run(batches: Iterator[Batch], step: Step | None, *, steps: int, batch: int, device: torch.device) -> Phase:
    """Time some steps; without `step`, batches are only taken."""
    synchronize(device)
    # Without steps the device does nothing else, and it is the host that waits.
    wait = DataWait(device if step is not None else torch.device("cpu"))
    handing_over, marks = list[float](), [timed_event(device)]
    start, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        (taken,) = wait.next_batches(batches)
        if step is not None:
            asked = time.perf_counter()
            step(taken)
            handing_over.append(time.perf_counter() - asked)
            wait.mark_step_end()
            marks.append(timed_event(device))
    cpu = time.process_time() - cpu  # waiting for the device keeps a core busy
    synchronize(device)
    seconds, images = time.perf_counter() - start, steps * batch
    on_gpu = [mark for mark in marks if mark is not None]
    return Phase(
        rate=images / seconds,
        cpu=cpu / images,
        waiting=wait.seconds() / seconds,
        # Not the median: a host that has filled the device's queue waits there for room.
        host=sorted(handing_over)[len(handing_over) // 4] if len(on_gpu) > 1 else 0.0,
        times=tuple(round(before.elapsed_time(after), 2) for before, after in itertools.pairwise(on_gpu)),
    )


def _reach_steady_rate(batches: Iterator[Batch], step: Step, *, batch: int, device: torch.device) -> None:
    """Take steps until a GPU's rate stays; nothing on a CPU, whose steps take seconds."""
    before = 0.0
    for _ in range(MOST_STRETCHES if device.type == "cuda" else 0):
        rate = run(batches, step, steps=STRETCH, batch=batch, device=device).rate
        if abs(rate - before) <= STEADY * before:
            return
        before = rate


def _median(phases: list[Phase]) -> Phase:
    names = [field.name for field in dataclasses.fields(Phase) if field.name != "times"]
    medians = {name: statistics.median(getattr(phase, name) for phase in phases) for name in names}
    return Phase(**medians, times=tuple(itertools.chain.from_iterable(phase.times for phase in phases)))


def predict(loader: Phase, model: Phase, *, cores: int | None) -> float:
    """Images per second that both together should reach: those of the slower, and where they share CPU cores (`cores`),
    no more than there is CPU time for."""
    seconds = max(1 / loader.rate, 1 / model.rate)
    return 1 / (max(seconds, (loader.cpu + model.cpu) / cores) if cores else seconds)

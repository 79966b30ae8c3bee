"""benchmarks/interpreter_lock.py measures the loader of training, and restores the interpreter's settings."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import pytest

from benchmarks import interpreter_lock
from benchmarks.interpreter_lock import MAIN, Options, burn, hold, loader_of, measure, parts, rates
from pipeline.plan import TrainPlan
from shards.format.dataset import ShardSet

BATCH = 16


@pytest.mark.parametrize("feed", ["threads", "process"])
@pytest.mark.parametrize("work", ["feed", "host"])
def test_the_loader_delivers_the_batches_of_the_plan(
    photos: Path, work: interpreter_lock.Work, feed: interpreter_lock.Feed
) -> None:
    dataset = ShardSet(photos)
    plan = TrainPlan(dataset.shard_samples("train"), global_batch=BATCH, seed=0, pairs=True)
    with loader_of(dataset, work, BATCH, feed) as loader:
        for step in range(3):
            assert next(loader).ids.tolist() == plan.ids(plan.at(step)).tolist()


@pytest.mark.parametrize("work", ["feed", "host", "pixels"])
def test_all_main_threads_are_measured_and_the_interpreter_is_restored(
    photos: Path, work: interpreter_lock.Work
) -> None:
    threads, interval = set(threading.enumerate()), sys.getswitchinterval()
    options = Options(rounds=1, seconds=0.1, batch=4 * BATCH, intervals=(1e-3,))
    found = measure(ShardSet(photos), work, options)
    assert found["batch"] == (BATCH if work == "pixels" else 4 * BATCH)
    names = {f"{feed}, {name}, switch interval 1 ms" for feed in options.feeds for name in MAIN}
    assert found["loader_keeps"].keys() == found["main_keeps"].keys() == names
    assert all(found["batches_per_second"][f"{feed}, alone"] > 0 for feed in ("threads", "process"))
    assert sys.getswitchinterval() == interval
    assert not set(threading.enumerate()) - threads


def test_each_part_of_the_work_takes_time(photos: Path) -> None:
    assert all(milliseconds > 0 for milliseconds in parts(ShardSet(photos), BATCH).values())


@pytest.mark.parametrize(("busy", "holds"), [(hold, True), (burn, False)])
def test_hold_keeps_the_lock_and_burn_releases_it(busy: object, holds: bool) -> None:
    """Another thread counts while the load runs, with a switch interval of an hour."""
    counted: list[int] = []
    stop = threading.Event()

    def count() -> None:
        while not stop.is_set():
            counted.append(len(counted))
            time.sleep(0)

    burn(0.01)  # calibrates it
    interval = sys.getswitchinterval()
    thread = threading.Thread(target=count)
    sys.setswitchinterval(3600)
    try:
        thread.start()
        before = len(counted)
        busy(0.3)  # type: ignore[operator]
        while not holds and len(counted) == before:  # on a busy machine, the other thread may not have run yet
            busy(0.1)  # type: ignore[operator]
        during = len(counted) - before
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        thread.join()
    assert (during == 0) is holds


def test_without_a_main_thread_batches_are_only_consumed(photos: Path) -> None:
    with loader_of(ShardSet(photos), "host", BATCH) as loader:
        batches, turns = rates(loader, None, 0.2)
    assert batches > 0
    assert turns == 0

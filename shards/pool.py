"""Worker processes that report their progress, die with their parent, and are missed when they die."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing.queues import SimpleQueue
from typing import Any, TypeVar

from shards.errors import ConversionFailed
from shards.progress import Progress

J = TypeVar("J")
R = TypeVar("R")
Report = Callable[[int, int], None]
"""Called with (items, bytes) done since the last call; raises when the run is to stop."""

POLL = 0.2  # seconds between looks at the counters

# Shared without locks, so that a worker killed at any moment leaves nobody waiting: the first number tells all to stop,
# then come two for each worker, who alone writes them.
_STOP, _FIRST = 0, 1
_counters: Any
_slot: int


class Stopped(Exception):
    """Raised in a worker when another one failed, or the run was interrupted."""


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def run_jobs(task: Callable[[J, Report], R], jobs: Sequence[J], workers: int | None, progress: Progress) -> list[R]:
    """Run `task(job, report)` for every job in worker processes (one per core unless told); results in their order.

    The first error ends the run: what runs is stopped at its next report, what has not started is dropped.

    Raises:
        ConversionFailed: a worker died (killed, or out of memory).
        Exception: whatever a task raised first.
    """
    size = min(workers or cores(), len(jobs))
    if size <= 1:
        return _run_here(task, jobs, progress)
    # Workers are forked from a server that has imported all they need, and that has no threads, unlike this process.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", task.__module__])
    counters = context.RawArray("q", _FIRST + 2 * size)
    slots: SimpleQueue[int] = context.SimpleQueue()
    for i in range(size):
        slots.put(_FIRST + 2 * i)
    with ProcessPoolExecutor(size, context, _start, (counters, slots)) as pool:
        futures = [pool.submit(partial(_run, task), job) for job in jobs]
        waiting = set(futures)
        try:
            while waiting:
                finished, waiting = wait(waiting, timeout=POLL, return_when=FIRST_EXCEPTION)
                progress.update(sum(counters[_FIRST::2]), sum(counters[_FIRST + 1 :: 2]))
                for future in finished:
                    future.result()
        except BrokenProcessPool as error:
            raise ConversionFailed(
                "a worker process died (killed, or out of memory?); run the same command to resume, "
                "with fewer --workers if memory is short"
            ) from error
        finally:
            counters[_STOP] = 1
            pool.shutdown(wait=True, cancel_futures=True)
    progress.update(sum(counters[_FIRST::2]), sum(counters[_FIRST + 1 :: 2]))
    return [future.result() for future in futures]


def _run_here(task: Callable[[J, Report], R], jobs: Sequence[J], progress: Progress) -> list[R]:
    """One worker needs no process of its own."""
    done = [0, 0]
    said = 0.0

    def report(items: int, size: int) -> None:
        nonlocal said
        done[0] += items
        done[1] += size
        if (now := time.monotonic()) - said > POLL:
            said = now
            progress.update(*done)

    results = [task(job, report) for job in jobs]
    progress.update(*done)
    return results


def _start(counters: Any, slots: SimpleQueue[int]) -> None:
    global _counters, _slot
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all: the parent alone decides
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _counters, _slot = counters, slots.get()


def _leave_with_parent() -> None:
    """A killed parent cannot tell its workers; the end of a pipe does."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run(task: Callable[[Any, Report], Any], job: Any) -> Any:
    return task(job, _report)


def _report(items: int, size: int) -> None:
    _counters[_slot] += items
    _counters[_slot + 1] += size
    if _counters[_STOP]:
        raise Stopped

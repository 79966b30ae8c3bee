"""Worker processes that report their progress, die with their parent, and are missed when they die."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing.sharedctypes import Synchronized
from typing import Any, TypeVar

from shards.errors import ConversionFailed
from shards.progress import Progress

J = TypeVar("J")
R = TypeVar("R")
Report = Callable[[int, int], None]

POLL = 0.2  # seconds between looks at the counters and, in a worker, at the parent

_items: Synchronized[int]
_bytes: Synchronized[int]


def run_jobs(task: Callable[[J, Report], R], jobs: Iterable[J], workers: int, progress: Progress) -> list[R]:
    """Run `task(job, report)` for every job in worker processes; results in the order of the jobs.

    The first error ends the run: what has not started is dropped, what runs is waited for.

    Raises:
        ConversionFailed: a worker died (killed, or out of memory).
        Exception: whatever a task raised first.
    """
    context = multiprocessing.get_context("spawn")
    items, size = context.Value("q", 0), context.Value("q", 0)
    with ProcessPoolExecutor(workers, context, _start, (items, size, os.getpid())) as pool:
        futures = [pool.submit(partial(_run, task), job) for job in jobs]
        waiting = set(futures)
        try:
            while waiting:
                finished, waiting = wait(waiting, timeout=POLL, return_when=FIRST_EXCEPTION)
                progress.update(items.value, size.value)
                for future in finished:
                    future.result()
        except BrokenProcessPool as error:
            raise ConversionFailed(
                "a worker process died (killed, or out of memory?); run the same command to resume, "
                "with fewer --workers if memory is short"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return [future.result() for future in futures]


def _start(items: Synchronized[int], size: Synchronized[int], parent: int) -> None:
    global _items, _bytes  # the way to hand an inherited counter to a pool's tasks
    _items, _bytes = items, size
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()


def _leave_with(parent: int) -> None:
    """Exit when the parent is gone: a killed parent cannot tell its workers."""
    while os.getppid() == parent:
        time.sleep(POLL)
    os._exit(1)


def _run(task: Callable[[Any, Report], Any], job: Any) -> Any:
    return task(job, _report)


def _report(items: int, size: int) -> None:
    with _items.get_lock():
        _items.value += items
    with _bytes.get_lock():
        _bytes.value += size

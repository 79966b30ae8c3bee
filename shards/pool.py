"""Worker processes that report their progress, are missed when they die, and leave when their parent does.

A pipe to each worker is all there is: no locks, semaphores or shared memory that a killed process could leave held or
lying about. When either end is gone, the other notices at its next message.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from typing import Any, TypeVar

from shards.errors import ConversionFailed
from shards.progress import Progress

J = TypeVar("J")
R = TypeVar("R")
Report = Callable[[int, int], None]
"""Called with (items, bytes) done since the last call; raises when the run is to stop."""

BEAT = 0.2  # seconds between a worker's reports


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
    crew = [_Worker(context, task) for _ in range(size)]
    try:
        return _dispatch(crew, jobs, progress)
    finally:
        for worker in crew:
            worker.pipe.close()
        for worker in crew:
            worker.process.join()


@dataclass(frozen=True)
class _Progress:
    items: int
    bytes: int


@dataclass(frozen=True)
class _Done:
    result: Any


@dataclass(frozen=True)
class _Failed:
    error: Exception


class _Worker:
    """A worker process, as its parent sees it."""

    def __init__(self, context: ForkServerContext, task: Callable[[Any, Report], Any]) -> None:
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, task), daemon=True)
        self.process.start()
        theirs.close()
        self.job: int | None = None

    def take(self, todo: deque[int], jobs: Sequence[Any]) -> None:
        """Give it the next job, if any is left."""
        self.job = todo.popleft() if todo else None
        if self.job is not None:
            self.pipe.send(jobs[self.job])


def _dispatch(crew: list[_Worker], jobs: Sequence[Any], progress: Progress) -> list[Any]:
    todo = deque(range(len(jobs)))
    results: list[Any] = [None] * len(jobs)
    items = size = 0
    try:
        for worker in crew:
            worker.take(todo, jobs)
        while busy := [worker for worker in crew if worker.job is not None]:
            ready = wait([worker.pipe for worker in busy])
            for worker in busy:
                if worker.pipe not in ready:
                    continue
                match worker.pipe.recv():
                    case _Progress(more, more_bytes):
                        items, size = items + more, size + more_bytes
                        progress.update(items, size)
                    case _Done(result):
                        assert worker.job is not None
                        results[worker.job] = result
                        worker.take(todo, jobs)
                    case _Failed(error):
                        raise error
    except (EOFError, ConnectionError) as error:
        raise ConversionFailed(
            "a worker process died (killed, or out of memory?); run the same command to resume, "
            "with fewer --workers if memory is short"
        ) from error
    return results


def _work(pipe: Connection, task: Callable[[Any, Report], Any]) -> None:
    """A worker's life: jobs come through the pipe until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all: the parent alone decides
    report = _Reporter(lambda items, size: pipe.send(_Progress(items, size)))
    try:
        while True:
            job = pipe.recv()
            try:
                result = task(job, report)
            except ConnectionError:
                raise
            except Exception as error:
                pipe.send(_Failed(error))
            else:
                report.flush()
                pipe.send(_Done(result))
    except (EOFError, ConnectionError):
        pass  # the parent is gone, or wants no more


class _Reporter:
    """Sums up reports and passes them on now and then."""

    def __init__(self, send: Callable[[int, int], None]) -> None:
        self._send = send
        self._items = self._bytes = 0
        self._sent = time.monotonic()

    def __call__(self, items: int, size: int) -> None:
        self._items += items
        self._bytes += size
        if time.monotonic() - self._sent > BEAT:
            self.flush()

    def flush(self) -> None:
        self._send(self._items, self._bytes)
        self._items = self._bytes = 0
        self._sent = time.monotonic()


def _run_here(task: Callable[[J, Report], R], jobs: Sequence[J], progress: Progress) -> list[R]:
    """One worker needs no process of its own."""
    done = [0, 0]

    def add(items: int, size: int) -> None:
        done[0] += items
        done[1] += size
        progress.update(*done)

    report = _Reporter(add)
    results = [task(job, report) for job in jobs]
    report.flush()
    return results

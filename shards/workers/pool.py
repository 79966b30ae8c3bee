"""Worker processes that report their progress, whose death is noticed, and that end with their parent.

A pipe to each worker carries jobs and results, and a shared page holds the name of the file that the worker is at, for
the error message if it dies. There are no locks or semaphores that a killed process could leave held, and the page has
no name that could be left behind. When either end of a pipe is gone, the other notices at its next message.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from typing import Any, TypeVar

from shards.cores import cores
from shards.errors import ConversionFailed, describe_os_error
from shards.files.temporary import prepare_sockets
from shards.images.limits import MAX_IMAGE_SECONDS
from shards.progress import Progress
from shards.redact import display_name
from shards.workers.worker import (
    PAGE_BYTES,
    REMEDY,
    WITHOUT_FILE,
    JobDone,
    JobFailed,
    ProgressMade,
    Report,
    Reporter,
    out_of_memory,
    run_worker,
)

J = TypeVar("J")
R = TypeVar("R")


def run_jobs(
    task: Callable[[J, Report], R],
    jobs: Sequence[J],
    workers: int | None,
    progress: Progress,
    *,
    isolated: bool = False,
) -> list[R]:
    """Run `task(job, report)` for every job in worker processes (one per core by default); results in their order.

    The first error ends the run: what runs is stopped at its next report, what has not started is dropped.

    Args:
        isolated: use a worker process even where one is enough; for tasks in which a library may end its process.

    Raises:
        UserError: no folder can be made for the workers' sockets.
        ConversionFailed: memory ran out, or a worker died; names the file that it was at.
        Exception: whatever a task raised first.
    """
    size = min(workers or cores(), len(jobs))
    if size <= 1 and not (isolated and jobs):
        return _run_here(task, jobs, progress)
    # Workers are forked from a server that has imported all they need, and that has no threads, unlike this process.
    prepare_sockets()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", task.__module__])
    processes: list[_Worker] = []
    try:
        try:
            for _ in range(size):
                processes.append(_Worker(context, task))
        except (OSError, EOFError) as error:
            fact, action = describe_os_error("", error) if isinstance(error, OSError) else (str(error), "")
            raise ConversionFailed(
                f"{size} worker processes cannot be started ({fact}); {f'{action}, or ' if action else ''}"
                "run the same command with fewer --workers"
            ) from error
        return _dispatch(processes, jobs, progress)
    finally:
        for worker in processes:
            worker.pipe.close()
        for worker in processes:
            worker.process.join()


class _Worker:
    """A worker process, as its parent sees it."""

    def __init__(self, context: ForkServerContext, task: Callable[[Any, Report], Any]) -> None:
        self.pipe, theirs = context.Pipe()
        self.page = context.RawArray("c", PAGE_BYTES)
        self.process = context.Process(target=run_worker, args=(theirs, self.page, task), daemon=True)
        self.process.start()
        theirs.close()
        self.job: int | None = None

    def death(self) -> ConversionFailed:
        """Explain why the process is gone."""
        self.process.join()
        code = self.process.exitcode or 0
        where = f" at {display_name(self.page.value)}" if self.page.value else ""
        if code == -signal.SIGXCPU:
            return ConversionFailed(f"an image took more than {MAX_IMAGE_SECONDS} s of CPU time{where}; {WITHOUT_FILE}")
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        return ConversionFailed(f"a worker process {how}{where} (out of memory?); {REMEDY}")

    def take(self, todo: deque[int], jobs: Sequence[Any]) -> None:
        """Give it the next job, if any is left."""
        self.job = todo.popleft() if todo else None
        if self.job is not None:
            self.pipe.send(jobs[self.job])


def _dispatch(processes: list[_Worker], jobs: Sequence[Any], progress: Progress) -> list[Any]:
    todo = deque(range(len(jobs)))
    results: list[Any] = [None] * len(jobs)
    items = size = 0
    worker = processes[0]
    try:
        for worker in processes:
            worker.take(todo, jobs)
        while busy := [worker for worker in processes if worker.job is not None]:
            ready = wait([worker.pipe for worker in busy])
            for worker in busy:
                if worker.pipe not in ready:
                    continue
                match worker.pipe.recv():
                    case ProgressMade(more, more_bytes):
                        items, size = items + more, size + more_bytes
                        progress.update(items, size)
                    case JobDone(result):
                        assert worker.job is not None
                        results[worker.job] = result
                        worker.take(todo, jobs)
                    case JobFailed(error):
                        raise error
    except (EOFError, ConnectionError) as error:
        raise worker.death() from error
    return results


def _run_here(task: Callable[[J, Report], R], jobs: Sequence[J], progress: Progress) -> list[R]:
    """One worker needs no process of its own."""
    done = [0, 0]

    def add(items: int, size: int) -> None:
        done[0] += items
        done[1] += size
        progress.update(*done)

    report = Reporter(add)
    try:
        results = [task(job, report) for job in jobs]
    except MemoryError as error:
        raise out_of_memory(report.name) from error
    report.flush()
    return results

"""A pool of worker processes that report progress. It detects when a worker dies; all workers end with the parent.

A pipe to each worker carries jobs and results. A shared memory page contains the name of the file that the worker is
processing, for the error message if it dies. There are no locks or semaphores that a killed process could leave locked,
and the page is anonymous, so nothing remains after a crash. A process detects the end of its peer at the next message.
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
    REMOVE_FILE,
    RESUME_OR_REMOVE_FILE,
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
    """Run `task(job, report)` for every job in worker processes, and return the results in the order of the jobs.

    The first error ends the run: running tasks stop at their next report, and jobs that have not started are dropped.

    Args:
        task: module-level function; `report` counts its progress.
        jobs: arguments of the tasks; must be picklable.
        workers: number of processes; None: one per core. One job, or one worker, runs in this process.
        progress: receives the sum of all reports.
        isolated: use a worker process even for one job, for libraries that may end their process.

    Raises:
        UserError: no folder can be created for the workers' sockets.
        ConversionFailed: a worker ran out of memory or died; the message names the file that it was processing.
        Exception: the first exception that a task raised.
    """
    size = min(workers or cores(), len(jobs))
    if size <= 1 and not (isolated and jobs):
        return _run_here(task, jobs, progress)
    # Workers are forked from a server process that has preloaded their modules and, unlike the parent, has no threads.
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
                "run the same command again with fewer --workers"
            ) from error
        return _dispatch(processes, jobs, progress)
    finally:
        for worker in processes:
            worker.pipe.close()
        for worker in processes:
            worker.process.join()


class _Worker:
    """The parent's handle of a worker process."""

    def __init__(self, context: ForkServerContext, task: Callable[[Any, Report], Any]) -> None:
        self.pipe, worker_end = context.Pipe()
        self.page = context.RawArray("c", PAGE_BYTES)
        self.process = context.Process(target=run_worker, args=(worker_end, self.page, task), daemon=True)
        self.process.start()
        worker_end.close()
        self.job: int | None = None

    def death_error(self) -> ConversionFailed:
        """Return an error that explains why the process died."""
        self.process.join()
        code = self.process.exitcode or 0
        where = f" at {display_name(self.page.value)}" if self.page.value else ""
        if code == -signal.SIGXCPU:
            return ConversionFailed(f"an image took more than {MAX_IMAGE_SECONDS} s of CPU time{where}; {REMOVE_FILE}")
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"
        return ConversionFailed(f"a worker process {how}{where} (out of memory?); {RESUME_OR_REMOVE_FILE}")

    def send_next(self, todo: deque[int], jobs: Sequence[Any]) -> None:
        """Send the next job to the worker, if there is one."""
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
            worker.send_next(todo, jobs)
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
                        worker.send_next(todo, jobs)
                    case JobFailed(error):
                        raise error
    except (EOFError, ConnectionError) as error:
        raise worker.death_error() from error
    return results


def _run_here(task: Callable[[J, Report], R], jobs: Sequence[J], progress: Progress) -> list[R]:
    """Run all jobs in this process."""
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

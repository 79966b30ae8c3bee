"""Worker processes that report their progress, are missed when they die, and leave when their parent does.

A pipe to each worker carries jobs and results, and a shared page holds the name of the file that the worker is at, for
the error message if it dies. There are no locks or semaphores that a killed process could leave held, and the page has
no name that could be left behind. When either end of a pipe is gone, the other notices at its next message.
"""

from __future__ import annotations

import math
import multiprocessing
import resource
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from typing import Any, Protocol, TypeVar

from shards.cores import cores
from shards.errors import ConversionFailed, cause
from shards.files.temporary import prepare_sockets
from shards.images.limits import MAX_IMAGE_SECONDS
from shards.progress import Progress
from shards.redact import display_name

J = TypeVar("J")
R = TypeVar("R")

BEAT = 0.2  # seconds between a worker's reports
_PAGE = 2048  # bytes for the name of a file; longer ones are cut
# The list of a source is made once, so that a file that is taken out of it means a new start.
_WITHOUT = "remove that file from the source and the unfinished set, then start again"
_REMEDY = f"run the same command to resume, with fewer --workers or more memory; or {_WITHOUT}"


class Report(Protocol):
    """What a task tells of its progress; raises when the run is to stop."""

    def __call__(self, items: int, size: int) -> None:
        """Count `items` images of `size` bytes in all as done since the last call."""

    def start(self, name: bytes) -> None:
        """Name the file that is begun, for the error message should memory or CPU time run out.

        From here on a worker process may take `MAX_IMAGE_SECONDS` of CPU time until the next call.
        """


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
            fact, action = cause("", error) if isinstance(error, OSError) else (str(error), "")
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
        self.page = context.RawArray("c", _PAGE)
        self.process = context.Process(target=_work, args=(theirs, self.page, task), daemon=True)
        self.process.start()
        theirs.close()
        self.job: int | None = None

    def death(self) -> ConversionFailed:
        """Explain why the process is gone."""
        self.process.join()
        code = self.process.exitcode or 0
        where = f" at {display_name(self.page.value)}" if self.page.value else ""
        if code == -signal.SIGXCPU:
            return ConversionFailed(f"an image took more than {MAX_IMAGE_SECONDS} s of CPU time{where}; {_WITHOUT}")
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        return ConversionFailed(f"a worker process {how}{where} (out of memory?); {_REMEDY}")

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
        raise worker.death() from error
    return results


def _work(pipe: Connection, page: Any, task: Callable[[Any, Report], Any]) -> None:
    """A worker's life: jobs come through the pipe until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all: the parent alone decides
    report = _WorkerReporter(lambda items, size: pipe.send(_Progress(items, size)), page)
    try:
        while True:
            job = pipe.recv()
            try:
                result = task(job, report)
            except ConnectionError:
                raise
            except MemoryError:
                pipe.send(_Failed(_out_of_memory(page.value)))
            except Exception as error:
                pipe.send(_Failed(error))
            else:
                report.flush()
                pipe.send(_Done(result))
            page.value = b""
    except (EOFError, ConnectionError):
        pass  # the parent is gone, or wants no more


def _out_of_memory(name: bytes) -> ConversionFailed:
    return ConversionFailed(f"{display_name(name) if name else 'a worker process'}: out of memory; {_REMEDY}")


class _Reporter:
    """Sums up reports and passes them on now and then."""

    def __init__(self, send: Callable[[int, int], None]) -> None:
        self._send = send
        self._items = self._bytes = 0
        self._sent = time.monotonic()
        self.name = b""

    def start(self, name: bytes) -> None:
        self.name = name

    def __call__(self, items: int, size: int) -> None:
        self._items += items
        self._bytes += size
        if time.monotonic() - self._sent > BEAT:
            self.flush()

    def flush(self) -> None:
        self._send(self._items, self._bytes)
        self._items = self._bytes = 0
        self._sent = time.monotonic()


class _WorkerReporter(_Reporter):
    """Publishes the name in the shared page, and limits the CPU time until the next one.

    The kernel ends the process (SIGXCPU) at its limit, even inside a decoder, which no handler in Python could.
    """

    def __init__(self, send: Callable[[int, int], None], page: Any) -> None:
        super().__init__(send)
        self._page = page
        _, self._most = resource.getrlimit(resource.RLIMIT_CPU)

    def start(self, name: bytes) -> None:
        self._page.value = name[: _PAGE - 1]
        limit = math.ceil(time.process_time()) + MAX_IMAGE_SECONDS
        if self._most == resource.RLIM_INFINITY or limit < self._most:
            resource.setrlimit(resource.RLIMIT_CPU, (limit, self._most))


def _run_here(task: Callable[[J, Report], R], jobs: Sequence[J], progress: Progress) -> list[R]:
    """One worker needs no process of its own."""
    done = [0, 0]

    def add(items: int, size: int) -> None:
        done[0] += items
        done[1] += size
        progress.update(*done)

    report = _Reporter(add)
    try:
        results = [task(job, report) for job in jobs]
    except MemoryError as error:
        raise _out_of_memory(report.name) from error
    report.flush()
    return results

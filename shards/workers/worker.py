"""The worker's side of the pool: take jobs, report progress, and limit the CPU time of an image."""

from __future__ import annotations

import math
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

from shards.errors import ConversionFailed
from shards.images.limits import MAX_IMAGE_SECONDS
from shards.redact import display_name

BEAT = 0.2  # seconds between a worker's reports
PAGE_BYTES = 2048  # bytes for the name of a file; longer ones are cut
# The list of a source is made once, so that a file that is taken out of it means a new start.
WITHOUT_FILE = "remove that file from the source and the unfinished set, then start again"
REMEDY = f"run the same command to resume, with fewer --workers or more memory; or {WITHOUT_FILE}"


class Report(Protocol):
    """Receives the progress of a task; raises when the run is to stop."""

    def __call__(self, items: int, size: int) -> None:
        """Count `items` images of `size` bytes in all as done since the last call."""

    def start(self, name: bytes) -> None:
        """Name the file that is begun, for the error message should memory or CPU time run out.

        From here on a worker process may take `MAX_IMAGE_SECONDS` of CPU time until the next call.
        """


def run_worker(pipe: Connection, page: Any, task: Callable[[Any, Report], Any]) -> None:
    """Run the jobs that come through the pipe, until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all: the parent alone decides
    report = WorkerReporter(lambda items, size: pipe.send(ProgressMade(items, size)), page)
    try:
        while True:
            job = pipe.recv()
            try:
                result = task(job, report)
            except ConnectionError:
                raise
            except MemoryError:
                pipe.send(JobFailed(out_of_memory(page.value)))
            except Exception as error:
                pipe.send(JobFailed(error))
            else:
                report.flush()
                pipe.send(JobDone(result))
            page.value = b""
    except (EOFError, ConnectionError):
        pass  # the parent is gone, or wants no more


def out_of_memory(name: bytes) -> ConversionFailed:
    """Return the error that memory ran out at a file; an empty name where none is known."""
    return ConversionFailed(f"{display_name(name) if name else 'a worker process'}: out of memory; {REMEDY}")


class Reporter:
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


class WorkerReporter(Reporter):
    """Publishes the name in the shared page, and limits the CPU time until the next one.

    The kernel ends the process (SIGXCPU) at its limit, even inside a decoder, which no handler in Python could.
    """

    def __init__(self, send: Callable[[int, int], None], page: Any) -> None:
        super().__init__(send)
        self._page = page
        _, self._most = resource.getrlimit(resource.RLIMIT_CPU)

    def start(self, name: bytes) -> None:
        self._page.value = name[: PAGE_BYTES - 1]
        limit = math.ceil(time.process_time()) + MAX_IMAGE_SECONDS
        if self._most == resource.RLIM_INFINITY or limit < self._most:
            resource.setrlimit(resource.RLIMIT_CPU, (limit, self._most))


@dataclass(frozen=True)
class ProgressMade:
    """Message: what was done since the last one."""

    items: int
    bytes: int


@dataclass(frozen=True)
class JobDone:
    """Message: a job has ended, and its worker wants the next."""

    result: Any


@dataclass(frozen=True)
class JobFailed:
    """Message: a job raised an error, which ends the run."""

    error: Exception

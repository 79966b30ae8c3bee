"""The worker side of the pool: run jobs, report progress, and limit the CPU time per image."""

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

REPORT_SECONDS = 0.2  # minimum time between two reports of a worker
PAGE_BYTES = 2048  # maximum length of a file name, in bytes; longer names are truncated
# The set must also be removed, because a source is listed only once per conversion.
REMOVE_FILE = "remove that file from the source, remove the unfinished set, then start again"
RESUME_OR_REMOVE_FILE = f"run the same command with fewer --workers or more memory to resume, or {REMOVE_FILE}"


class Report(Protocol):
    """Receives the progress of a task; raises an exception if the run must stop."""

    def __call__(self, items: int, size: int) -> None:
        """Report that `items` more images, of `size` bytes in total, are done."""

    def start(self, name: bytes) -> None:
        """Record the name of the next file, for the error message if memory or CPU time runs out.

        A worker process may use `MAX_IMAGE_SECONDS` of CPU time until the next call.
        """


def run_worker(pipe: Connection, page: Any, task: Callable[[Any, Report], Any]) -> None:
    """Run the jobs received from the pipe until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all processes; only the parent handles it
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
        pass  # the parent has ended or closed the pipe


def out_of_memory(name: bytes) -> ConversionFailed:
    """Return the error for running out of memory at a file; `name` may be empty."""
    where = display_name(name) if name else "a worker process"
    return ConversionFailed(f"{where}: out of memory; {RESUME_OR_REMOVE_FILE}")


class Reporter:
    """Accumulates reports and sends them at most every `REPORT_SECONDS`."""

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
        if time.monotonic() - self._sent > REPORT_SECONDS:
            self.flush()

    def flush(self) -> None:
        self._send(self._items, self._bytes)
        self._items = self._bytes = 0
        self._sent = time.monotonic()


class WorkerReporter(Reporter):
    """Writes the file name to the shared page, and limits the CPU time until the next file.

    At the limit, the kernel ends the process with SIGXCPU, even in a C decoder, where Python handlers do not run.
    """

    def __init__(self, send: Callable[[int, int], None], page: Any) -> None:
        super().__init__(send)
        self._page = page
        _, self._hard_limit = resource.getrlimit(resource.RLIMIT_CPU)

    def start(self, name: bytes) -> None:
        self._page.value = name[: PAGE_BYTES - 1]
        limit = math.ceil(time.process_time()) + MAX_IMAGE_SECONDS
        if self._hard_limit == resource.RLIM_INFINITY or limit < self._hard_limit:
            resource.setrlimit(resource.RLIMIT_CPU, (limit, self._hard_limit))


@dataclass(frozen=True)
class ProgressMade:
    """Message: progress since the previous message."""

    items: int
    bytes: int


@dataclass(frozen=True)
class JobDone:
    """Message: a job is done, and its worker is ready for the next one."""

    result: Any


@dataclass(frozen=True)
class JobFailed:
    """Message: a job raised an exception, which ends the run."""

    error: Exception

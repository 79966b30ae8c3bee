"""Record when each stage of a loader works and how full its queues are, for `--profile` (docs/profiling.md).

Times are those of `time.monotonic_ns`, which on Linux is one clock for all processes of a machine.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")
U = TypeVar("U")

MAX_EVENTS = 500_000  # a few hundred MB; beyond it, the oldest events are discarded

# Waits are spans too, so that a thread's time is complete. Their names say what the thread waits for.
WAIT_FOR_BATCH = "wait for batch"
"""Training waits for the loader."""
WAIT_FOR_READ = "wait for read"
WAIT_FOR_DECODE = "wait for decode"
WAIT_FOR_FEED = "wait for feed process"
WAIT_FOR_GPU = "wait for GPU"
"""The loader waits until the GPU has decoded and augmented earlier batches."""
WAIT_FOR_SPACE = "wait for space"
"""The next queue is full: the loader is ahead of training, or the feed process ahead of the loader."""
WAITS = frozenset({WAIT_FOR_BATCH, WAIT_FOR_READ, WAIT_FOR_DECODE, WAIT_FOR_FEED, WAIT_FOR_GPU, WAIT_FOR_SPACE})


class Span(NamedTuple):
    """Work of a stage on a batch, or a wait, in one thread. Spans of a thread are disjoint or nested."""

    stage: str
    batch: int | None
    """Number of the batch, counted from the start of the loader; None if unknown."""
    start: int
    end: int
    """Nanoseconds of `time.monotonic_ns`."""
    thread: str


class QueueLevel(NamedTuple):
    """Number of batches in a queue from a point in time on."""

    queue: str
    time: int
    """Nanoseconds of `time.monotonic_ns`."""
    batches: int


Event = Span | QueueLevel


class StageTrace:
    """Events of one loader in one process. Thread-safe. Records nothing until `start` is called.

    Args:
        process: prefix of the thread names.
    """

    def __init__(self, process: str = "") -> None:
        self.recording = False
        self._process = process
        self._events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self._open: dict[int, tuple[str, int | None, int, str]] = {}

    def start(self) -> None:
        """Discard earlier events and start to record."""
        self._open.clear()
        self._events.clear()
        self.recording = True

    def stop(self) -> None:
        """Stop recording. Spans that have not ended end now."""
        self.recording = False
        now = time.monotonic_ns()
        for key in list(self._open):
            self._end(key, now)

    def drain(self) -> list[Event]:
        """Remove and return the events recorded so far."""
        return [self._events.popleft() for _ in range(len(self._events))]

    def extend(self, events: Iterable[Event]) -> None:
        """Add events of another process."""
        if self.recording:
            self._events.extend(events)

    def span(self, stage: str, batch: int | None = None) -> AbstractContextManager[object]:
        """Record the time inside the `with` block. A generator must not yield in it."""
        return _OpenSpan(self, stage, batch) if self.recording else _NO_SPAN

    def call(self, stage: str, batch: int | None, function: Callable[..., U], *arguments: Any) -> U:
        """Call a function and record a span of the call."""
        with self.span(stage, batch):
            return function(*arguments)

    def map(self, stage: str, function: Callable[[T], U], items: Iterable[T]) -> Iterator[U]:
        """Apply a function to every batch, and record a span of each call."""
        for number, item in enumerate(items):  # the result has no name, so that it is freed once it is not used
            yield self.call(stage, number, function, item)

    def level(self, queue: str, batches: int) -> None:
        """Record the number of batches in a queue."""
        if self.recording:
            self._events.append(QueueLevel(queue, time.monotonic_ns(), batches))

    def level_when_done(self, queue: str, futures: Sequence[Future[Any]], count: Callable[[], int]) -> None:
        """Record `count()` as the number of batches in a queue, at the moment when all futures are done."""
        if not self.recording:
            return
        waiting = [future for future in futures if not future.done()]

        def note(_: object) -> None:
            if all(future.done() for future in reversed(waiting)):
                self.level(queue, count())

        for future in waiting:
            future.add_done_callback(note)
        if not waiting:
            self.level(queue, count())

    def _begin(self, key: int, stage: str, batch: int | None) -> None:
        thread = threading.current_thread().name
        name = f"{self._process}: {thread}" if self._process else thread
        self._open[key] = stage, batch, time.monotonic_ns(), name

    def _end(self, key: int, end: int) -> None:
        # `pop` is atomic, so a span that ends while another thread calls `stop` is recorded once.
        begun = self._open.pop(key, None)
        if begun is not None:
            stage, batch, start, thread = begun
            self._events.append(Span(stage, batch, start, end, thread))


class _OpenSpan:
    __slots__ = ("_batch", "_stage", "_trace")

    def __init__(self, trace: StageTrace, stage: str, batch: int | None) -> None:
        self._trace, self._stage, self._batch = trace, stage, batch

    def __enter__(self) -> None:
        self._trace._begin(id(self), self._stage, self._batch)

    def __exit__(self, *_: object) -> None:
        self._trace._end(id(self), time.monotonic_ns())


_NO_SPAN = contextlib.nullcontext()

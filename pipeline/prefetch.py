"""An iterator that runs another iterator in a thread, a bounded number of items ahead."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

from pipeline.stage_trace import WAIT_FOR_BATCH, WAIT_FOR_SPACE, StageTrace

T = TypeVar("T")

# How often a producer that waits for queue space checks whether it has been closed.
_POLL_SECONDS = 0.1


class Prefetcher(Generic[T]):
    """Iterator over the items of `source`, which runs in a thread.

    An exception of the source is raised at the consumer, after the items that precede it. Every later `next` raises it
    again, so no item is ever skipped.

    Args:
        source: iterator to run. A generator is also closed in the thread that ran it.
        depth: maximum number of items that wait for the consumer.
        name: name of the thread.
        trace: records the waits at the queue and its level ("ready").
    """

    def __init__(self, source: Iterator[T], *, depth: int, name: str, trace: StageTrace | None = None) -> None:
        self._source, self._trace, self._taken = source, trace or StageTrace(), 0
        self._queue: queue.Queue[tuple[bool, T | BaseException]] = queue.Queue(depth)
        self._closed = threading.Event()
        self._end: BaseException | None = None
        # A daemon thread, so that the process can exit even if the consumer fails before it calls `close`.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._end is not None:
            raise self._end
        with self._trace.span(WAIT_FOR_BATCH, self._taken):
            ended, item = self._queue.get()
        self._trace.level("ready", self.ready)
        self._taken += 1
        if ended:
            assert isinstance(item, BaseException)
            self._end = item
            raise item
        return item  # type: ignore[return-value]

    @property
    def ready(self) -> int:
        """Number of items that wait for the consumer."""
        return self._queue.qsize()

    def close(self) -> None:
        """Stop the thread and wait until it has ended. Idempotent."""
        self._closed.set()
        self._end = self._end or StopIteration()
        while self._thread.is_alive() or not self._queue.empty():
            with contextlib.suppress(queue.Empty):
                self._queue.get(timeout=_POLL_SECONDS)
        self._queue.put((True, self._end))  # wakes a consumer that waits in another thread

    def _run(self) -> None:
        end: BaseException = StopIteration()
        try:
            for number, item in enumerate(self._source):
                with self._trace.span(WAIT_FOR_SPACE, number):
                    if not self._put((False, item)):
                        return
                self._trace.level("ready", self.ready)
        except BaseException as error:  # the consumer raises the error, whatever its type
            end = error
        finally:
            close = getattr(self._source, "close", None)
            if close is not None:
                close()
        self._put((True, end))

    def _put(self, entry: tuple[bool, T | BaseException]) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(entry, timeout=_POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False

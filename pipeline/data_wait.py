"""How long training stood still because a batch was not ready."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch

from pipeline.batch import Batch, timed_event


class StreamEvent(Protocol):
    """A point in a stream's work, such as a CUDA event that keeps its time."""

    def query(self) -> bool:
        """Whether the device has come there."""

    def elapsed_time(self, end_event: Any, /) -> float:
        """Milliseconds from here to another moment; less than 0 if that was earlier."""


class DataWait:
    """Takes batches for a training loop and accounts for the time that it waited for them.

    On a GPU the host runs ahead of the device. That it waits for the loader's thread, which waits for the device in its
    turn, costs nothing; what counts is the time from the end of a step on the device to the moment when the last of the
    next step's batches was whole there. CUDA events tell both; they are read when they have happened, so nothing waits
    for the device. On a CPU it is the time that taking the batches took.

    Args:
        device: of the training.
        mark: returns the present point of the training's stream. None = what suits the device.
    """

    def __init__(self, device: torch.device, mark: Callable[[], StreamEvent | None] | None = None) -> None:
        self._mark = mark or partial(timed_event, device)
        self.restart()

    def restart(self) -> None:
        """Begin anew; the device is taken to be idle from here."""
        self._waited = 0.0
        self._pending: collections.deque[tuple[StreamEvent, Sequence[StreamEvent]]] = collections.deque()
        self._idle_from = self._mark()

    def next_batches(self, loader: Iterator[Batch], count: int = 1) -> list[Batch]:
        """Return the next step's batches."""
        asked = time.perf_counter()
        batches = [next(loader) for _ in range(count)]
        if self._idle_from is None:
            self._waited += time.perf_counter() - asked
        else:
            self._pending.append((self._idle_from, [batch.ready for batch in batches if batch.ready is not None]))
        return batches

    def mark_step_end(self) -> None:
        """Mark the end of the step of the batches that were taken last, all of whose work is in the stream now."""
        if self._idle_from is not None:
            self._idle_from = self._mark()
            self._add_reached_steps()

    def seconds(self) -> float:
        """Seconds since the last `restart`, of steps that the device has begun."""
        self._add_reached_steps()
        return self._waited

    def _add_reached_steps(self) -> None:
        """Account for steps whose beginning the device has reached; keeps no more events than it lags behind."""
        while self._pending:
            idle_from, ready = self._pending[0]
            if not all(moment.query() for moment in (idle_from, *ready)):
                return
            self._pending.popleft()
            self._waited += max((0.0, *(idle_from.elapsed_time(moment) for moment in ready))) / 1000

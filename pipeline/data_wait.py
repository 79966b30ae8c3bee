"""Measure how long training waited because a batch was not ready."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch

from pipeline.batch import Batch, timed_event


class StreamEvent(Protocol):
    """A point in the work of a CUDA stream, with the methods of `torch.cuda.Event` that this module uses."""

    def query(self) -> bool:
        """Return whether the device has reached the event."""

    def elapsed_time(self, end_event: Any, /) -> float:
        """Return the milliseconds from this event to another; negative if the other event was earlier."""


class DataWait:
    """Fetches the batches of a training loop and adds up the time that training waited for them.

    On a GPU, the host runs ahead of the device, so time that the host waits for the loader costs nothing. The wait of a
    step is the time from the end of the previous step on the device until the last of its batches is complete on the
    device. Both points are CUDA events. They are read only after the device has reached them, so measuring never waits
    for the device. On a CPU, the wait is the time that fetching the batches takes.

    Args:
        device: device of the training.
        mark: records an event at the current point of the training's stream. None: a CUDA event on a GPU, no event on a
            CPU.
    """

    def __init__(self, device: torch.device, mark: Callable[[], StreamEvent | None] | None = None) -> None:
        self._mark = mark or partial(timed_event, device)
        self.restart()

    def restart(self) -> None:
        """Reset the measured time. The device counts as idle from this point."""
        self._waited = 0.0
        self._pending: collections.deque[tuple[StreamEvent, Sequence[StreamEvent]]] = collections.deque()
        self._idle_from = self._mark()

    def next_batches(self, loader: Iterator[Batch], count: int = 1) -> list[Batch]:
        """Fetch the `count` batches of the next step from the loader."""
        start = time.perf_counter()
        batches = [next(loader) for _ in range(count)]
        if self._idle_from is None:
            self._waited += time.perf_counter() - start
        else:
            self._pending.append((self._idle_from, [batch.ready for batch in batches if batch.ready is not None]))
        return batches

    def mark_step_end(self) -> None:
        """Mark the end of a step. Call this after all work of the step has been queued on the stream."""
        if self._idle_from is not None:
            self._idle_from = self._mark()
            self._add_reached_steps()

    def seconds(self) -> float:
        """Return the seconds of waiting since the last `restart`, over all steps that the device has started."""
        self._add_reached_steps()
        return self._waited

    def _add_reached_steps(self) -> None:
        """Add the waits of all steps that the device has started, and release their events."""
        while self._pending:
            idle_from, ready = self._pending[0]
            if not all(event.query() for event in (idle_from, *ready)):
                return
            self._pending.popleft()
            self._waited += max((0.0, *(idle_from.elapsed_time(event) for event in ready))) / 1000

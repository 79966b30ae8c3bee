"""Measure the speed of a GPU with a fixed amount of work, which does not depend on other ranks."""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Callable
from functools import partial

import torch

from pipeline.batch import timed_event
from pipeline.data_wait import StreamEvent

SIDE = 3072  # of the multiplied matrices: 58 GFLOP, about 0.1 ms on an H200
PROBE_SECONDS = 5.0  # between measurements, so that they take about 0.004 % of the time


class GpuSpeed:
    """Multiplies two matrices now and then, and measures the time that takes on the device.

    On a CPU, and after a failure, it does nothing. Events are read only after the device has reached them.

    Args:
        device: device of the training.
        mark: records an event at the current point of the training's stream.
        work: queues the work of one measurement on the stream.
    """

    def __init__(
        self,
        device: torch.device,
        mark: Callable[[], StreamEvent | None] | None = None,
        work: Callable[[], object] | None = None,
    ) -> None:
        self._mark = mark or partial(timed_event, device)
        self._work = work
        self._pending: collections.deque[tuple[StreamEvent, StreamEvent]] = collections.deque()
        self._at = time.monotonic()
        self._milliseconds = 0.0
        self._times: list[float] = []
        if device.type == "cuda" and work is None:
            with contextlib.suppress(RuntimeError):  # out of memory: training continues without this measurement
                factors = torch.ones((2, SIDE, SIDE), dtype=torch.float16, device=device)
                self._work = partial(torch.mm, factors[0], factors[1], out=torch.empty_like(factors[0]))

    def measure(self) -> None:
        """Queue a measurement if one is due. Call this between steps; it does not wait for the device."""
        now = time.monotonic()
        if self._work is None or now - self._at < PROBE_SECONDS:
            return
        self._at = now
        try:
            self._work()  # while this runs, the host queues the rest, so its delays are not measured
            start = self._mark()
            self._work()
            end = self._mark()
        except RuntimeError:
            self._work = None
            return
        if start is not None and end is not None:
            self._pending.append((start, end))

    def take(self) -> float:
        """Return the shortest time of the measurements since the last call, in milliseconds; 0: there was none yet.

        If there was no new measurement, it is that of the last call.
        """
        while self._pending and all(event.query() for event in self._pending[0]):
            start, end = self._pending.popleft()
            self._times.append(start.elapsed_time(end))
        if self._times:
            self._milliseconds = min(self._times)
            self._times = []
        return self._milliseconds

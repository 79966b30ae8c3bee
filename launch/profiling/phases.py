"""Measure how the time of optimizer steps divides into waiting for data, forward, backward and optimizer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.profiler import record_function

from launch.machine.device_peaks import synchronize
from pipeline.batch import timed_event

DATA_WAIT, OTHER = "data wait", "other"
PHASES = ("forward", "backward", "optimizer")

Mark = torch.cuda.Event | int
"""A point in time: an event of the training's stream, or nanoseconds of `time.monotonic_ns` on a CPU."""


class _Step(NamedTuple):
    begin: Mark
    phases: list[tuple[str, Mark, Mark]]
    end: Mark


class StepPhases:
    """Measures phases on the device: on a GPU with CUDA events, which are read at the end only.

    Waiting for data is the time from the begin of a step to its first phase.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._steps: list[_Step] = []
        self._begin: Mark = 0
        self._phases: list[tuple[str, Mark, Mark]] = []

    def begin_step(self) -> None:
        self._begin, self._phases = self._mark(), []

    def end_step(self) -> None:
        self._steps.append(_Step(self._begin, self._phases, self._mark()))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the block, and label its operators in the trace of torch.profiler."""
        start = self._mark()
        with record_function(name):
            yield
        self._phases.append((name, start, self._mark()))

    def seconds(self) -> dict[str, float]:
        """Return the seconds of all steps by phase, including `DATA_WAIT` and `OTHER`. Waits for the device."""
        synchronize(self._device)
        sums = dict.fromkeys((DATA_WAIT, *PHASES, OTHER), 0.0)
        for begin, phases, end in self._steps:
            parts = [(name, _seconds(start, stop)) for name, start, stop in phases]
            if phases:
                parts.insert(0, (DATA_WAIT, _seconds(begin, phases[0][1])))
            for name, seconds in parts:
                sums[name] += seconds
            sums[OTHER] += _seconds(begin, end) - sum(seconds for _, seconds in parts)
        return sums

    def _mark(self) -> Mark:
        return timed_event(self._device) or time.monotonic_ns()


def _seconds(start: Mark, end: Mark) -> float:
    if isinstance(start, int) or isinstance(end, int):
        assert isinstance(start, int)
        assert isinstance(end, int)
        return (end - start) / 1e9
    return start.elapsed_time(end) / 1e3

"""A device whose events are simulated by a clock: an event has occurred when the clock has reached the event's time."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any


@dataclass
class Device:
    """A device at time `now` (milliseconds); work that is queued now is done at time `done`."""

    now: float = 0.0
    done: float = 0.0

    def mark(self) -> Moment:
        return Moment(self, max(self.now, self.done))

    def batch(self, at: float) -> Any:
        return SimpleNamespace(ready=Moment(self, at))


@dataclass
class Moment:
    device: Device
    at: float
    asked: list[float] = field(default_factory=list)

    def query(self) -> bool:
        return self.device.now >= self.at

    def elapsed_time(self, end_event: Moment) -> float:
        assert self.query(), "CUDA raises an error: the event has not occurred"
        assert end_event.query(), "CUDA raises an error: the event has not occurred"
        self.asked.append(self.device.now)
        return end_event.at - self.at

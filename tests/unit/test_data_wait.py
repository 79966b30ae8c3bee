"""The time that training waits for data (pipeline/data_wait.py), measured on a GPU with CUDA events.

The GPU is simulated by a clock: an event has occurred when the clock has reached the event's time.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.batch import timed_event
from pipeline.data_wait import DataWait
from tests.support.simulated_device import Device

CPU = torch.device("cpu")


def train(wait: DataWait, device: Device, ready: float, step: float, *, micro: int = 1) -> None:
    """Run a step of `step` milliseconds whose last micro-batch is complete at time `ready`."""
    wait.next_batches(iter([device.batch(ready * (n + 1) / micro) for n in range(micro)]), micro)
    device.done = max(device.done, ready, device.now) + step
    wait.mark_step_end()


def test_waits_of_a_host_that_runs_ahead_of_the_device_do_not_count() -> None:
    device = Device()
    wait = DataWait(CPU, device.mark)
    device.now = 10.0
    wait.restart()

    def slow() -> Iterator[Any]:
        for ready in (5.0, 40.0, 80.0):  # late for the host, but the device has work until 110 and 210
            yield device.batch(ready)

    batches = slow()
    for _ in range(3):
        wait.next_batches(batches)
        device.done = max(device.done, device.now) + 100.0
        wait.mark_step_end()
    device.now = 1000.0
    assert wait.seconds() == 0.0


@pytest.mark.parametrize("micro", [1, 3])
def test_the_wait_is_the_time_from_the_end_of_a_step_to_the_last_batch_of_the_next(micro: int) -> None:
    device = Device()
    wait = DataWait(CPU, device.mark)
    train(wait, device, ready=30.0, step=100.0, micro=micro)  # the device is idle from the start
    train(wait, device, ready=120.0, step=100.0, micro=micro)  # complete before the previous step ended, at 130
    train(wait, device, ready=250.0, step=100.0, micro=micro)  # 20 ms after the previous step ended
    device.now = 1000.0
    assert wait.seconds() == pytest.approx(0.050)
    device.now = device.done = 2000.0
    wait.restart()
    assert wait.seconds() == 0.0
    train(wait, device, ready=2007.0, step=100.0, micro=micro)
    device.now = 3000.0
    assert wait.seconds() == pytest.approx(0.007)


def test_events_are_read_once_they_have_occurred_and_then_released() -> None:
    device = Device()
    wait = DataWait(CPU, device.mark)
    for number in range(50):
        train(wait, device, ready=10.0 * number + 5.0, step=1.0)
        device.now = max(0.0, 10.0 * number - 20.0)  # the device is two steps behind
        assert len(wait._pending) <= 4
    before = wait.seconds()
    assert 0 < before < 0.5
    device.now = 1000.0
    assert before < wait.seconds() == pytest.approx(0.005 + 49 * 0.009)


def test_on_a_cpu_the_wait_is_the_time_of_fetching_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("pipeline.data_wait.time.perf_counter", lambda: now)
    assert timed_event(CPU) is None
    wait = DataWait(CPU)

    def batches() -> Iterator[Any]:
        nonlocal now
        while True:
            now += 0.25
            yield SimpleNamespace(ready=None)

    source = batches()
    assert len(wait.next_batches(source, 2)) == 2
    now += 10.0  # the step
    wait.mark_step_end()
    wait.next_batches(source)
    assert wait.seconds() == 0.75
    wait.restart()
    assert wait.seconds() == 0.0


def test_batches_record_an_event_with_timing_when_they_are_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    """The elapsed time of an event without timing cannot be read."""
    made: list[SimpleNamespace] = []

    def event(*, enable_timing: bool) -> SimpleNamespace:
        made.append(SimpleNamespace(timed=enable_timing, stream=None))
        made[-1].record = lambda stream: setattr(made[-1], "stream", stream)
        return made[-1]

    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    assert timed_event(torch.device("cuda", 1)) is made[0]
    assert (made[0].timed, made[0].stream) == (True, "stream of cuda:1")

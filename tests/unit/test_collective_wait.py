"""The time in collectives, and the speed of a GPU (launch/stragglers/collective_wait.py, gpu_speed.py).

The GPU is simulated by a clock, as in test_data_wait.py.
"""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from launch.stragglers import collective_wait
from launch.stragglers.collective_wait import SAMPLED_STEPS, CollectiveWait, collective, measure_deepspeed
from launch.stragglers.gpu_speed import PROBE_SECONDS, GpuSpeed
from tests.support.simulated_device import Device

CPU = torch.device("cpu")


class Stream(Device):
    """A device that counts its events."""

    events = 0

    def mark(self) -> Any:
        self.events += 1
        return super().mark()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(collective_wait.time, "perf_counter", lambda: now.seconds)
    return now


def test_on_a_cpu_the_time_of_collectives_in_steps_is_added(clock: SimpleNamespace) -> None:
    waits = CollectiveWait(CPU)
    with collective():  # outside of a step
        clock.seconds += 100
    for _ in range(2):
        with waits.step():
            clock.seconds += 7
            with collective(), collective(frequent=True):  # one inside the other counts once
                clock.seconds += 1
            with collective(frequent=True):
                clock.seconds += 2
    with collective():
        clock.seconds += 100
    assert waits.seconds() == 6
    waits.restart()
    assert waits.seconds() == 0


def test_a_backward_pass_waits_from_its_end_until_the_gradients_are_reduced(clock: SimpleNamespace) -> None:
    """As in DDP: a hook registers a callback, which waits for the reduction after the pass of this rank has ended."""
    waits = CollectiveWait(CPU)
    layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))

    def wait_for_others() -> None:
        clock.seconds += 3

    def compute(gradient: torch.Tensor) -> None:
        clock.seconds += 5
        torch.autograd.Variable._execution_engine.queue_callback(wait_for_others)

    layers[1].weight.register_hook(compute)  # the reduction begins before the pass has ended
    layers[0].weight.register_hook(lambda gradient: setattr(clock, "seconds", clock.seconds + 4))
    with waits.step():
        loss = layers(torch.ones(1, 2)).sum()
        with waits.backward(loss):
            loss.backward()
    assert clock.seconds == 12
    assert waits.seconds() == 3


def test_on_a_gpu_events_are_read_once_the_device_has_reached_them() -> None:
    stream = Stream()
    waits = CollectiveWait(CPU, mark=stream.mark)
    for step in range(40):
        stream.now = stream.done - 22.0  # the device is in the third collective from the end
        with waits.step():
            stream.done += 7.0
            with collective():
                stream.done += 3.0
        assert len(waits._pending) <= 4, f"step {step}: events are not released"
    assert waits.seconds() == pytest.approx(0.108)  # of 36 steps; `Moment` raises an error if events are read too early
    stream.now = stream.done
    assert waits.seconds() == pytest.approx(0.120)


def test_frequent_collectives_are_measured_in_a_sample_of_steps_on_a_gpu() -> None:
    stream = Stream()
    waits = CollectiveWait(CPU, mark=stream.mark)

    def train(steps: int) -> None:
        for _ in range(steps):
            with waits.step():
                for _ in range(70):
                    stream.done += 0.1
                    with collective(frequent=True):
                        stream.done += 0.1
            stream.now = stream.done

    train(2 * SAMPLED_STEPS)
    assert stream.events == 2 * 2 * 70  # in two steps
    assert waits.seconds() == pytest.approx(2 * SAMPLED_STEPS * 0.007)
    waits.restart()
    train(3)  # none of which is measured: the last figure is used
    assert waits.seconds() == pytest.approx(3 * 0.007)


def test_idle_time_before_steps_is_measured_if_collectives_cannot_be() -> None:
    stream = Stream()
    waits = CollectiveWait(CPU, mark=stream.mark, incomplete=True)
    for _ in range(3):
        stream.done += 20.0  # the device waits for the host or for data
        with waits.step():
            stream.done += 100.0
    stream.now = stream.done
    assert waits.idle_seconds() == pytest.approx(0.040)
    waits.restart()
    stream.done += 5000.0  # an evaluation
    with waits.step():
        stream.done += 100.0
    stream.now = stream.done
    assert waits.idle_seconds() == 0.0


def test_a_gpu_measures_its_speed_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, clock = Stream(), SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock.seconds)
    cost = iter([9.0, 0.3, 9.0, 0.2, 9.0, 0.4])

    def work() -> None:
        stream.done += next(cost)

    speed = GpuSpeed(CPU, stream.mark, work)
    for _ in range(31):
        clock.seconds += PROBE_SECONDS / 10
        speed.measure()
    assert stream.events == 2 * 3
    assert speed.take() == 0.0  # the device has not reached the events
    stream.now = 1000.0
    assert speed.take() == pytest.approx(0.2)
    assert speed.take() == pytest.approx(0.2)


def test_a_speed_that_cannot_be_measured_does_not_end_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("CUDA error")

    stream = Stream()
    speed = GpuSpeed(CPU, stream.mark, fail)
    monkeypatch.setattr(time, "monotonic", lambda: 1e6)
    speed.measure()
    speed.measure()
    assert speed.take() == 0.0


def test_a_version_of_deepspeed_with_another_interface_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collective_wait.importlib, "import_module", lambda _: SimpleNamespace())
    assert not measure_deepspeed()

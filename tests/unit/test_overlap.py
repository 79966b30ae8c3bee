"""The training thread does no Python work per sample and never waits for the device.

The same test on a GPU, with CUDA's own check of synchronization, is tests/gpu/test_overlap.py.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.decode.dali import MAX_KEPT, InUseBuffers
from tests.support.host_waits import HostWaits
from tests.support.training_loop import training

STEPS = 50
SMALL, LARGE = 4, 12


def calls_per_step(data: Path, out: Path, batch: int) -> tuple[float, Counter[str]]:
    """Return the number of Python and C functions that the training thread calls per step, and a count by function."""
    calls: Counter[str] = Counter()

    def note(frame: FrameType, event: str, arg: Any) -> None:
        if event in ("call", "c_call"):
            calls[frame.f_code.co_qualname if event == "call" else getattr(arg, "__qualname__", "?")] += 1

    with training(data, out, batch=batch, device="cpu") as step:
        for _ in range(3):
            step()
        sys.setprofile(note)
        try:
            for _ in range(STEPS):
                step()
        finally:
            sys.setprofile(None)
    return calls.total() / STEPS, calls


@pytest.mark.slow
def test_the_training_thread_makes_no_python_calls_per_sample(tmp_path: Path, digits: Path) -> None:
    small, _ = calls_per_step(digits, tmp_path / "small", SMALL)
    large, calls = calls_per_step(digits, tmp_path / "large", LARGE)
    # The same number of calls with three times the samples; one call per sample and step would add 8.
    assert large == pytest.approx(small, abs=2), calls.most_common(10)


@pytest.mark.parametrize("options", [(), ("--accumulate",), ("--ema", "0.9")])
def test_no_step_waits_for_the_device(tmp_path: Path, digits: Path, options: tuple[str, ...]) -> None:
    extra = ("--micro-batch", str(SMALL // 2)) if "--accumulate" in options else options
    with training(digits, tmp_path / "run", *extra, batch=SMALL, device="cpu") as step:
        step()
        with HostWaits() as waits:
            for _ in range(3):
                step()
    assert not waits.found


ONE, CPU = torch.ones(()), torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "wait"),
    [
        ("_local_scalar_dense", ONE.item),
        ("_local_scalar_dense", lambda: float(ONE)),
        ("_local_scalar_dense", lambda: [0, 1][ONE.long()]),
        ("_local_scalar_dense", lambda: ONE and None),
        ("tolist", ONE.tolist),
        ("cpu", ONE.cpu),
        ("numpy", ONE.numpy),
        ("nonzero", lambda: torch.ones(3).nonzero()),
        ("index", lambda: torch.ones(3)[torch.ones(3).bool()]),
        ("masked_fill_", lambda: torch.ones(3).masked_fill_(torch.ones(3).bool(), ONE)),
        ("tensor", lambda: torch.tensor(1.0, device=CPU)),
        ("as_tensor", lambda: torch.as_tensor(1.0, device=CPU)),
        ("new_tensor", lambda: ONE.new_tensor([1.0])),
    ],
)
def test_waits_are_counted_with_their_source_line(name: str, wait: Callable[[], object]) -> None:
    with HostWaits() as waits:
        wait()
    assert waits.found.total() == 1
    (trace,) = waits.found
    assert trace.startswith(f"{name} < tests/unit/test_overlap.py:")


@pytest.mark.parametrize(
    "work",
    [
        lambda: torch.zeros(3, device=CPU).add_(ONE).sum(),
        lambda: torch.tensor(1.0),  # on the host
        lambda: torch.as_tensor(ONE, device=CPU),
        lambda: torch.ones(3)[torch.tensor([0, 2])],
        lambda: torch.ones(3).masked_fill_(torch.ones(3).bool(), 2.0),
        lambda: torch.where(torch.ones(3).bool(), ONE, 0.0),
    ],
)
def test_asynchronous_work_is_not_counted(work: Callable[[], object]) -> None:
    with HostWaits() as waits:
        work()
    assert not waits.found


class Event:
    """A CUDA event that completes when the test sets `happened`, or when it is waited for."""

    def __init__(self) -> None:
        self.happened, self.waited = False, False
        self.guarded: list[weakref.ref[Any]] = []

    def query(self) -> bool:
        return self.happened

    def synchronize(self) -> None:
        assert all(one() is not None for one in self.guarded), "released before the event was waited for"
        self.waited, self.happened = not self.happened, True


def test_decoded_images_stay_alive_until_their_stream_has_read_them() -> None:
    events: list[Event] = []
    stream = SimpleNamespace(record_event=lambda: events.append(Event()) or events[-1])
    in_use = InUseBuffers(stream)
    images = [torch.zeros(1) for _ in range(MAX_KEPT + 2)]
    held = [weakref.ref(one) for one in images]
    for number in range(MAX_KEPT):
        in_use.keep(images[number])
    images[:MAX_KEPT] = [None] * MAX_KEPT
    assert all(one() is not None for one in held)
    events[0].happened = True
    in_use.keep(images.pop())
    assert [one() is None for one in held[:2]] == [True, False]
    in_use.keep(images.pop())  # exceeds MOST_KEPT, so it waits for the oldest event
    assert held[1]() is None
    assert [event.waited for event in events] == [False, True, *[False] * MAX_KEPT]
    in_use.close()
    assert all(one() is None for one in held)
    assert events[-1].waited


def test_inputs_of_the_decoder_are_held_as_long_as_its_images() -> None:
    events: list[Event] = []
    in_use = InUseBuffers(SimpleNamespace(record_event=lambda: events.append(Event()) or events[-1]))
    for _ in range(MAX_KEPT + 1):
        images, inputs = torch.zeros(1), np.zeros(1)
        if not events:
            first = [weakref.ref(images), weakref.ref(inputs)]
        in_use.keep(images, (inputs,))
        events[0].guarded = first
        del images, inputs
    assert events[0].waited
    assert [one() for one in first] == [None, None]

"""Measure how long a rank's steps wait in collectives: for other ranks, and for the transfer.

All ranks of a synchronous training take the same time for a step. The slowest rank is the one that waits least, so the
time of a step minus these waits is a rank's own work.
"""

from __future__ import annotations

import collections
import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial, wraps
from typing import Any, ClassVar

import torch
from torch import Tensor

from pipeline.batch import timed_event
from pipeline.data_wait import StreamEvent

# On a GPU, the collectives of BatchNorm are measured in one of this many steps: two events for each would cost the
# host about 0.7 ms per step.
SAMPLED_STEPS = 32
# Methods of DeepSpeed's communication backend through which ZeRO reduces gradients and gathers parameters.
_DEEPSPEED = (
    *("all_reduce", "all_reduce_coalesced", "reduce", "reduce_scatter", "reduce_scatter_tensor", "broadcast"),
    *("all_gather", "all_gather_into_tensor", "all_gather_coalesced"),
)


class CollectiveWait:
    """Adds up the time that the collectives of this rank's steps take, as far as no computation hides it.

    On a GPU, that is the time between two CUDA events in the stream of the training. They are read only after the
    device has reached them, so measuring never waits for the device. On a CPU, it is the time of the blocking calls.

    Args:
        device: device of the training.
        incomplete: some collectives cannot be measured: those in CUDA graphs or compiled code, and those of ZeRO 3. On
            a GPU, `idle_seconds` is then measured too.
        mark: records an event at the current point of a stream. None: a CUDA event on a GPU, no event on a CPU.
    """

    _current: ClassVar[CollectiveWait | None] = None  # whose step is running: layers have no access to the engine

    def __init__(
        self, device: torch.device, *, incomplete: bool = False, mark: Callable[[], StreamEvent | None] | None = None
    ) -> None:
        self.incomplete = incomplete
        self._device = device
        self._mark = mark or partial(timed_event, device)
        self._events = mark is not None or device.type == "cuda"
        self._measuring = self._sampling = False
        self._count = 0
        self._rate = 0.0  # seconds per step of the collectives that are measured only in some steps
        self._idle_from: StreamEvent | None = None
        self.restart()

    def restart(self) -> None:
        """Reset the measured time."""
        self._waited = self._sampled = self._idle = 0.0
        self._steps = self._sampled_steps = 0
        self._pending: collections.deque[tuple[StreamEvent, StreamEvent, str]] = collections.deque()
        self._idle_from = None  # evaluation and saving are not idle time

    @contextmanager
    def step(self) -> Iterator[None]:
        """Measure the collectives of a step, during which this is the instance that `collective` uses."""
        if self._events and self.incomplete:
            start = self._mark()
            if self._idle_from is not None and start is not None:
                self._pending.append((self._idle_from, start, "_idle"))
        self._measuring = True
        self._sampling = not self._events or self._count % SAMPLED_STEPS == SAMPLED_STEPS // 2
        previous, CollectiveWait._current = CollectiveWait._current, self
        try:
            yield
        finally:
            CollectiveWait._current = previous
            self._measuring = False
            self._count += 1
            self._steps += 1
            if self._events:
                self._sampled_steps += self._sampling
                self._idle_from = self._mark() if self.incomplete else None
                self._add_reached()

    @contextmanager
    def backward(self, loss: Tensor) -> Iterator[None]:
        """Measure how long a backward pass of DDP waits for gradients after the pass of this rank has ended.

        DDP waits in a callback that autograd calls after the pass. A callback that was registered earlier, at the
        beginning of the pass, is called before it.
        """
        ended: list[Any] = []
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None

        def on_end() -> None:
            ended.append(self._now(stream))

        def on_start(_: Tensor) -> None:
            torch.autograd.Variable._execution_engine.queue_callback(on_end)

        loss.register_hook(on_start)
        yield
        if ended and self._measuring:
            self._add(ended[0], self._now(stream), "_waited")

    @contextmanager
    def collective(self, *, frequent: bool) -> Iterator[None]:
        """Measure a collective.

        Args:
            frequent: there are so many that on a GPU they are measured only in some steps.
        """
        if not self._measuring or (frequent and not self._sampling):
            yield
            return
        self._measuring = False  # a collective inside this one must not count twice
        start = self._now()
        try:
            yield
        finally:
            self._add(start, self._now(), "_sampled" if frequent and self._events else "_waited")
            self._measuring = True

    def seconds(self) -> float:
        """Return the seconds in collectives since the last `restart`, over all that the device has finished."""
        self._add_reached()
        if self._sampled_steps:
            self._rate = self._sampled / self._sampled_steps
        return self._waited + self._rate * self._steps

    def idle_seconds(self) -> float:
        """Return the seconds that the device was idle before steps, because of data or of the host."""
        self._add_reached()
        return self._idle

    def _now(self, stream: torch.cuda.Stream | None = None) -> Any:
        if not self._events:
            return time.perf_counter()
        if stream is None:
            return self._mark()
        with torch.cuda.stream(stream):
            return self._mark()

    def _add(self, start: Any, end: Any, total: str) -> None:
        if self._events:
            self._pending.append((start, end, total))
        else:
            setattr(self, total, getattr(self, total) + end - start)

    def _add_reached(self) -> None:
        """Add the times of all events that the device has reached, and release the events."""
        while self._pending:
            start, end, total = self._pending[0]
            if not (start.query() and end.query()):
                return
            self._pending.popleft()
            setattr(self, total, getattr(self, total) + max(0.0, start.elapsed_time(end)) / 1000)


def collective(*, frequent: bool = False) -> AbstractContextManager[None]:
    """Return a context that measures a collective, if a step is being measured (see `CollectiveWait.collective`)."""
    current = CollectiveWait._current
    return nullcontext() if current is None else current.collective(frequent=frequent)


def measure_deepspeed() -> bool:
    """Let DeepSpeed's collectives be measured in the steps of `CollectiveWait`; return whether that is possible."""
    try:
        backend: Any = importlib.import_module("deepspeed.comm.comm").cdb
        for name in _DEEPSPEED:
            method = getattr(backend, name, None)
            if method is not None and not hasattr(method, "measured"):  # the backend serves all engines of a process
                setattr(backend, name, _measured(method))
    except (ImportError, AttributeError, TypeError):  # another version of DeepSpeed, whose interface differs
        return False
    return backend is not None


def _measured(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        # An asynchronous collective takes no time of its own.
        with nullcontext() if kwargs.get("async_op") else collective():
            return method(*args, **kwargs)

    call.measured = True  # type: ignore[attr-defined]
    return call

"""Preemption: signals, files in the run folder and a deadline become one agreed decision at a step boundary.

Handlers only set flags. All ranks exchange their flags once a step, on a gloo group of its own and one step behind, so
that no GPU and no rank waits for it; whatever was asked of one rank then happens on all of them after the same step.

    SIGTERM, SIGINT, SIGUSR2, RUN/PREEMPT, deadline    save a checkpoint and leave with `EXIT_STATUS`
    SIGUSR1, RUN/SAVE                                   save a checkpoint and go on
    one of the first three again, seconds later         leave at once, without saving
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterable, Iterator
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from launch.config.resilience import PreemptConfig
from launch.machine.world import World

T = TypeVar("T")

log = logging.getLogger(__name__)

STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
SAVE = (signal.SIGUSR1,)
# One request may arrive several times: SLURM and Ctrl-C signal every process, and the launcher passes it on as well.
SAME_REQUEST_SECONDS = 5.0


class Request(IntEnum):
    """What is asked for; of several, the greatest counts."""

    NOTHING = 0
    SAVE = 1
    STOP = 2


class StopRequested(Exception):
    """All ranks have agreed to save and leave; the message says who asked for it."""


class Preemption:
    """Collects requests; use as a context manager around the training loop.

    Args:
        run: run folder, for the files.
        deadline: time by `time.monotonic` by which the run should leave; None = none.
    """

    def __init__(self, run: Path, world: World, *, deadline: float | None) -> None:
        self._run, self._world, self._deadline = run, world, deadline
        # Set by handlers, which may run between any two instructions: `_stop` is never cleared, `_save` before a look.
        self._stop = False
        self._save = False
        self._stop_requested_at = 0.0
        self._old: dict[int, Any] = {}
        self._ignored: set[str] = set()
        self._group = dist.new_group(backend="gloo") if world.size > 1 else None
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._pending: Any = None
        self._reason = ""  # what asked this rank

    def __enter__(self) -> Preemption:
        for number in (*STOP, *SAVE):
            self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def save_requested(self) -> bool:
        """Whether all ranks write a checkpoint now. Collective.

        Raises:
            StopRequested: all ranks save and leave now.
        """
        asked = self._asked()
        if self._group is None:
            decision = asked
        else:  # what was asked for until the last call
            if self._pending is not None:
                self._pending.wait()
            decision = Request(int(self._flag))
            self._flag.fill_(asked)
            self._pending = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        if decision is Request.STOP:
            raise StopRequested(self._reason or "another rank's request")
        return decision is Request.SAVE

    def until_stop(self, items: Iterable[T]) -> Iterator[T]:
        """Yield `items`, of which every rank has equally many.

        Raises:
            StopRequested: after the same item on all ranks.
        """
        for item in items:
            yield item
            self.save_requested()  # a checkpoint is written after the evaluation anyway

    def _asked(self) -> Request:
        save, self._save = self._save, False
        if self._world.is_main:  # one rank's look at files and the clock is enough
            save |= self._found("SAVE")
            if self._found("PREEMPT"):
                self._stop = True
            elif self._deadline is not None and time.monotonic() > self._deadline:
                self._stop, self._reason = True, "the deadline"
        if self._stop:
            return Request.STOP
        return Request.SAVE if save else Request.NOTHING

    def _found(self, name: str) -> bool:
        """Remove the request file `name` from the run folder; returns whether it was there.

        One that cannot be removed (a folder, no permission) would be found at every step: it is ignored with a warning.
        """
        path = self._run / name
        if not os.path.lexists(path):
            return False
        try:
            path.unlink()
        except FileNotFoundError:
            return False
        except OSError as error:
            if name not in self._ignored:
                self._ignored.add(name)
                log.warning("%s: ignored, as it cannot be removed (%s)", path, error.strerror)
            return False
        self._reason = f"the file {name}"
        return True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number in SAVE:
            self._save = True
            return
        now = time.monotonic()
        if not self._stop:
            self._stop, self._stop_requested_at, self._reason = True, now, signal.Signals(number).name
        elif now - self._stop_requested_at > SAME_REQUEST_SECONDS:
            os._exit(128 + number)


def deadline(config: PreemptConfig, *, started: float, job_end: str) -> float | None:
    """When to leave: `time_limit` from `started`, else `preempt_margin` before the SLURM job's end.

    SLURM says the end by the wall clock. It is converted once, at the start: a clock that is set later changes nothing.

    Args:
        started: by `time.monotonic`, as the result is.
        job_end: value of SLURM_JOB_END_TIME; "" outside of a job.
    """
    if config.time_limit is not None:
        return started + 60 * config.time_limit
    if not (job_end.isascii() and job_end.isdigit()):
        return None
    return time.monotonic() + float(job_end) - time.time() - config.preempt_margin

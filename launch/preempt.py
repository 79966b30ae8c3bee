"""Preemption: signals, files in the run folder and a deadline become one agreed decision at a step boundary.

Handlers only set flags. All ranks exchange their flags once a step, on a gloo group of its own and one step behind, so
that no GPU and no rank waits for it; whatever was asked of one rank then happens on all of them after the same step.

    SIGTERM, SIGINT, SIGUSR2, RUN/PREEMPT, deadline    save a checkpoint and leave with `EXIT_STATUS`
    SIGUSR1, RUN/SAVE                                   save a checkpoint and go on
    the same signal again                               leave at once, without saving
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from launch.world import World

EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: try again later
LEAVE = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
SAVE = (signal.SIGUSR1,)
# Before the end of a SLURM job or time limit: a save, and the end of the processes, must fit in.
MARGIN_SECONDS = 120.0


class Request(IntEnum):
    """What is asked for; of several, the greatest counts."""

    NOTHING = 0
    SAVE = 1
    LEAVE = 2


class Preempted(Exception):
    """The run has been saved and should end with `EXIT_STATUS`."""


class Preemption:
    """Collects requests; use as a context manager around the training loop.

    Args:
        run: run folder, for the files.
        deadline: Unix time by which the run should have left; None = none.
    """

    def __init__(self, run: Path, world: World, *, deadline: float | None) -> None:
        self._run, self._world, self._deadline = run, world, deadline
        self._asked = Request.NOTHING
        self._seen: Counter[int] = Counter()
        self._old: dict[int, Any] = {}
        self._group = dist.new_group(backend="gloo") if world.size > 1 else None
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._pending: Any = None
        self.reason = ""
        """What asked this rank, for people."""

    def __enter__(self) -> Preemption:
        for number in (*LEAVE, *SAVE):
            self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def agreed(self) -> Request:
        """What all ranks do now; called once a step by every rank. It is what they asked for until the step before."""
        asked = max(self._asked, self._look_around())
        self._asked = Request.NOTHING if asked == Request.SAVE else asked
        if self._group is None:
            return asked
        if self._pending is not None:
            self._pending.wait()
        decision = Request(int(self._flag))
        self._flag.fill_(asked)
        self._pending = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return decision

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._seen[number] += 1
        if self._seen[number] > 1 and number in LEAVE:
            os._exit(128 + number)
        self._asked = max(self._asked, Request.LEAVE if number in LEAVE else Request.SAVE)
        self.reason = signal.Signals(number).name

    def _look_around(self) -> Request:
        """Files and the clock, on rank 0 alone: one rank's word is enough."""
        if not self._world.is_main:
            return Request.NOTHING
        if self._deadline is not None and time.time() > self._deadline:
            self.reason = "the deadline"
            return Request.LEAVE
        for name, request in (("PREEMPT", Request.LEAVE), ("SAVE", Request.SAVE)):
            if (self._run / name).exists():
                (self._run / name).unlink(missing_ok=True)
                self.reason = f"the file {name}"
                return request
        return Request.NOTHING


def deadline(time_limit: float | None, started: float) -> float | None:
    """When the run should leave: `time_limit` minutes after `started`, else shortly before the SLURM job's end."""
    if time_limit is not None:
        return started + 60 * time_limit
    end = os.environ.get("SLURM_JOB_END_TIME")
    return float(end) - MARGIN_SECONDS if end and end.isdigit() else None

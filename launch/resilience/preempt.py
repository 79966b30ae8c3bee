"""Preemption: turn signals, files in the run folder and a deadline into one decision of all ranks at a step boundary.

Signals only set flags (`launch.resilience.stop_signals`). All ranks exchange their flags once per step on a separate
gloo group, and use the result one step later, so that neither a GPU nor a rank waits for the exchange. A request to one
rank thus takes effect on all ranks after the same step.

    SIGTERM, SIGINT, SIGUSR2, SIGHUP, RUN/PREEMPT, deadline    save a checkpoint and exit with `EXIT_STATUS`
    SIGUSR1, RUN/SAVE                                          save a checkpoint and continue
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Iterator
from enum import IntEnum
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from launch.config.resilience import PreemptConfig
from launch.machine.world import World
from launch.resilience.stop_signals import Phase, StopSignals

T = TypeVar("T")

log = logging.getLogger(__name__)


class Request(IntEnum):
    """Kind of a request. If there are several requests, the greatest kind takes effect."""

    NOTHING = 0
    SAVE = 1
    STOP = 2


class StopRequested(Exception):
    """All ranks have agreed to save and stop; the message says what requested it."""


class Preemption:
    """Collector of requests to save or stop; a context manager for the training loop.

    Args:
        run: run folder, in which the request files are created.
        deadline: `time.monotonic()` at which the run should stop; None: no deadline.
        signals: the process's signals; None: signals are not received.
    """

    def __init__(self, run: Path, world: World, *, deadline: float | None, signals: StopSignals | None = None) -> None:
        self._run, self._world, self._deadline = run, world, deadline
        self.signals = signals or StopSignals()
        self._stop = False
        self._ignored: set[str] = set()
        self._group = dist.new_group(backend="gloo") if world.size > 1 else None
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._pending: Any = None
        self._reason = ""  # signal, file or deadline that asked this rank to stop or save

    def __enter__(self) -> Preemption:
        self.signals.phase = Phase.TRAINING
        return self

    def __exit__(self, *_: object) -> None:
        self.signals.phase = Phase.ENDING

    def save_requested(self) -> bool:
        """Return whether all ranks must write a checkpoint now. Collective.

        Raises:
            StopRequested: all ranks must save and stop now.
        """
        request = self._local_request()
        if self._group is None:
            decision = request
        else:  # act on the requests of all ranks up to the previous call
            if self._pending is not None:
                self._pending.wait()
            decision = Request(int(self._flag))
            self._flag.fill_(request)
            self._pending = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        if decision is Request.STOP:
            raise StopRequested(self._reason or "another rank's request")
        return decision is Request.SAVE

    def until_stop(self, items: Iterable[T]) -> Iterator[T]:
        """Yield `items` until a stop is requested. Collective: every rank must have the same number of items.

        Raises:
            StopRequested: on all ranks, after the same item.
        """
        with self.signals.during(Phase.EVALUATING):
            for item in items:
                yield item
                self.save_requested()  # a request to save needs no action: a checkpoint follows every evaluation

    def _local_request(self) -> Request:
        """Return what this rank has been requested to do since the last call."""
        save, self.signals.save = self.signals.save, False
        if self.signals.stop and not self._stop:
            self._stop, self._reason = True, self.signals.stop
        if self._world.is_main:  # only rank 0 checks the request files and the deadline
            save |= self._consume("SAVE")
            if self._consume("PREEMPT"):
                self._stop = True
            elif self._deadline is not None and time.monotonic() > self._deadline:
                self._stop, self._reason = True, "the deadline"
        if self._stop:
            return Request.STOP
        return Request.SAVE if save else Request.NOTHING

    def _consume(self, name: str) -> bool:
        """Remove the request file `name` from the run folder, and return whether it existed.

        A file that cannot be removed (a folder, no permission) would be found at every step, so it is ignored with a
        warning.
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
                log.warning("%s: the request is ignored because the file cannot be removed (%s)", path, error.strerror)
            return False
        self._reason = f"the file {name}"
        return True


def deadline(config: PreemptConfig, *, started: float, job_end: str) -> float | None:
    """Return when to stop: `time_limit` after `started`, else `preempt_margin` before the end of the SLURM job.

    SLURM reports the end as wall-clock time. It is converted once, so that adjusting the clock later has no effect.

    Args:
        started: start of the run by `time.monotonic()`, like the result.
        job_end: value of SLURM_JOB_END_TIME; empty outside of a job.
    """
    if config.time_limit is not None:
        return started + 60 * config.time_limit
    if not (job_end.isascii() and job_end.isdigit()):
        return None
    return time.monotonic() + float(job_end) - time.time() - config.preempt_margin

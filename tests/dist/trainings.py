"""Trainings like those of `python launch/train.py`, but forked from a process that has imported their modules.

This saves the five seconds of CPU time of a fresh start, in tests that do not depend on how a training is started.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

from tests.dist.forked import SECONDS, Launcher

TRAIN = "launch.train"


@dataclass(frozen=True)
class Ended:
    """Result of a training that has ended; names as in subprocess.CompletedProcess."""

    returncode: int
    stderr: str


class Training:
    """Running training; starting another one kills it. Names as in subprocess.Popen."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self._status: int | None = None
        self.pid = launcher.running[0]
        self.stderr = launcher.errors.open(encoding="utf-8", errors="replace")

    def poll(self) -> int | None:
        return self.wait() if self._status is not None or self._launcher.have_ended() else None

    def wait(self, timeout: float = SECONDS) -> int:
        """Wait for the end, and return the status of the first failed rank, or 0. Raise AssertionError on timeout."""
        if self._status is None:
            self._status = next(filter(None, self._launcher.join(timeout)), 0)
        return self._status

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)


class Trainer:
    """Starts one training at a time.

    Its methods take the `options` of `program`, a module that the launcher has imported, and the number of `ranks`.
    """

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher

    def __call__(self, *options: str | Path, program: str = TRAIN, ranks: int = 1) -> Ended:
        """Run a training until it ends."""
        training = self.start(*options, program=program, ranks=ranks)
        return Ended(training.wait(), training.stderr.read())

    def start(self, *options: str | Path, program: str = TRAIN, ranks: int = 1) -> Training:
        self._launcher.start(program, *options, ranks=ranks)
        return Training(self._launcher)

    def output(self) -> str:
        """Return what the last training has printed so far."""
        return self._launcher.errors.read_text(encoding="utf-8", errors="replace")

    def kill(self) -> None:
        """Kill the ranks of the last training, if they are running."""
        self._launcher.kill()

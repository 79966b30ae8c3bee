"""Trainings as `python launch/train.py` starts them, forked from a process that has imported what they need.

For tests that are about what a training does, not about how it is started: a fresh start takes five seconds of a core.
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
    """What came of a training; names as in subprocess.CompletedProcess."""

    returncode: int
    stderr: str


class Training:
    """A training that runs, until the next one is started; names as in subprocess.Popen."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self._status: int | None = None
        self.pid = launcher.running[0]
        self.stderr = launcher.errors.open(encoding="utf-8", errors="replace")

    def poll(self) -> int | None:
        return self.wait() if self._status is not None or self._launcher.have_ended() else None

    def wait(self, timeout: float = SECONDS) -> int:
        """The status of the first rank that has failed, 0 if none has. AssertionError if the end takes too long."""
        if self._status is None:
            self._status = next(filter(None, self._launcher.join(timeout)), 0)
        return self._status

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)


class Trainer:
    """Starts trainings, one at a time.

    Args of its methods:
        options: of `program`, a module that the launcher has imported.
        ranks: processes, without a launcher that ends the others when one is killed.
    """

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher

    def __call__(self, *options: str | Path, program: str = TRAIN, ranks: int = 1) -> Ended:
        """Train to the end."""
        training = self.start(*options, program=program, ranks=ranks)
        return Ended(training.wait(), training.stderr.read())

    def start(self, *options: str | Path, program: str = TRAIN, ranks: int = 1) -> Training:
        self._launcher.start(program, *options, ranks=ranks)
        return Training(self._launcher)

    def kill(self) -> None:
        """Kill the ranks of the training that was started last, if they are running."""
        self._launcher.kill()

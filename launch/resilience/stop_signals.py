"""Signals that ask a training to stop or to save, from its start to its end.

The main thread may be in a step of many seconds, so a thread answers at once (`shards.interrupt.SignalThread`):

    first signal    while the run starts: one line, and the process ends, because there is nothing to save
                    afterwards: one line that says what happens; `Preemption` saves at the next step boundary
    second signal   one line that says which steps are lost; RUN/status is written and the process ends

Only rank 0 prints and writes.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from types import FrameType

from launch.machine.rank_errors import is_rank0
from launch.machine.simple_launcher import LAUNCHER
from launch.resilience.watchdog import finishes
from launch.run.status import Status
from shards.interrupt import SignalThread, write_line
from shards.redact import printable
from shards.sources.naming.classes import format_count

STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)
SAVE = (signal.SIGUSR1,)
# One request may arrive several times: SLURM signals every process, and the launcher forwards the signal too; a closed
# terminal sends SIGHUP, and its shell as well. Under load this takes seconds.
SAME_REQUEST_SECONDS = 5.0
# Ctrl-C sends one SIGINT per key press, and torch's launcher forwards it at once. A person presses again after a second
# or two; faster presses are taken for one, so that a double press does not lose steps.
SAME_KEY_PRESS_SECONDS = 1.0
PRINT_SECONDS = 1.0
STATUS_SECONDS = 5.0  # time limit for writing RUN/status, because the file system may hang


class Phase(Enum):
    """What the training does, and what follows from the first signal."""

    STARTING = "interrupted before training started; nothing is lost"
    TRAINING = "finishing this step, then saving"
    EVALUATING = "interrupting the evaluation, which the next start repeats; then saving"
    SAVING = "saving the checkpoint, then stopping"
    FINISHING = "training is complete; writing the last files"
    ENDING = "the run has been saved, or has failed"


@dataclass
class Unsaved:
    """What would be lost if the run ended now."""

    step: int
    """Optimizer steps done."""
    saved: int | None
    """Step of the newest checkpoint; None: there is none."""

    def __str__(self) -> str:
        if self.step == (self.saved or 0):
            saved = f", the checkpoint of step {self.saved} contains all steps" if self.saved else ""
            return f"nothing is lost{saved}"
        steps = format_count(self.step - (self.saved or 0), "step")
        return f"lost: {steps}" + (f" since the checkpoint of step {self.saved}" if self.saved else ", all of the run")


class StopSignals:
    """Context manager that receives the signals of `STOP` and `SAVE`.

    Attributes:
        phase: what the training does now; set by the training loop.
        stop: name of the signal that has asked to stop; empty: none. It is never cleared.
        save: whether a signal has asked to save; cleared by the reader.
        say: prints a line for the user.
        unsaved: returns what would be lost; None: not known yet.
        write_status: writes RUN/status ("preempted" or "failed", step of the newest checkpoint, reason), if it is this
            run's; called on rank 0 before the process ends.
        close: removes the live view, which would overwrite the last line; called on rank 0 before the process ends.
    """

    def __init__(self) -> None:
        self.phase = Phase.STARTING
        self.stop, self.save = "", False
        self.say: Callable[[str], None] = write_line
        self.unsaved: Callable[[], Unsaved] | None = None
        self.write_status: Callable[[Status, int | None, str], object] = lambda status, step, reason: None
        self.close: Callable[[], object] = lambda: None
        self._first: tuple[int, float] | None = None  # signal, and when it arrived
        self._thread = SignalThread(self._react, dict.fromkeys((*STOP, *SAVE), self._note))

    def __enter__(self) -> StopSignals:
        self._thread.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.__exit__(*error)

    @contextlib.contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Set the phase for a block, which may be a generator that is closed only later."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            if self.phase is phase:
                self.phase = before

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Remember the request. Called in the main thread, so that it is complete before the next statement."""
        if number in SAVE:
            self.save = True
        elif not self.stop:
            self.stop = signal.Signals(number).name

    def _react(self, number: int) -> None:
        """Answer a signal. Called in a thread, as soon as the signal arrives."""
        if number in SAVE:
            return
        if self.phase is Phase.STARTING:
            self._end_start(number)
        elif self._first is None:
            self._first = number, time.monotonic()
            self._announce(number)
        elif not self._is_repeated(number):
            self._end_without_saving(number)

    def _is_repeated(self, number: int) -> bool:
        """Return whether a signal belongs to the same request as the first one."""
        assert self._first is not None
        first, arrived = self._first
        if number != signal.SIGINT and self.phase is Phase.ENDING:
            return True  # the launcher ends this rank because another has already ended
        pressed_again = first == number == signal.SIGINT
        return time.monotonic() - arrived < (SAME_KEY_PRESS_SECONDS if pressed_again else SAME_REQUEST_SECONDS)

    def _announce(self, number: int) -> None:
        if not is_rank0() or self.phase is Phase.ENDING:
            return
        loss = "end without them" if self.phase is Phase.FINISHING else "stop without saving"
        again = "press Ctrl-C again" if number == signal.SIGINT else "send it again after 5 s"
        line = f"{signal.Signals(number).name}: {self.phase.value}; {again} to {loss}"
        if not finishes(lambda: self.say(line), PRINT_SECONDS):
            write_line(line)

    def _end_start(self, number: int) -> None:
        """End a run that has not begun to train."""
        if is_rank0():
            finishes(self.close, PRINT_SECONDS)
            finishes(lambda: write_line(self.phase.value), PRINT_SECONDS)
            reason = f"{signal.Signals(number).name} before training started"
            finishes(lambda: self.write_status("preempted", None, reason), STATUS_SECONDS)
        LAUNCHER.exit(128 + number)

    def _end_without_saving(self, number: int) -> None:
        lost = self.unsaved() if self.unsaved is not None else None
        reason = f"ended at once; {lost}" if lost else "ended at once"
        if is_rank0():
            finishes(self.close, PRINT_SECONDS)
            finishes(lambda: write_line(printable(reason)), PRINT_SECONDS)
            step = lost.saved if lost else None
            text = f"{signal.Signals(number).name} twice: {reason}"
            finishes(lambda: self.write_status("failed", step, text), STATUS_SECONDS)
        LAUNCHER.exit(128 + number)

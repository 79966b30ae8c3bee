"""One training of a soak: injects failures, starts the ranks again, and measures what each failure costs."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

from tests.soak.accounting import Failure, attribute_loss, caught_up, had_saved, settle
from tests.soak.failures import INJECT, Effect
from tests.soak.job import TICK_SECONDS, Job, RoundFailed
from tests.soak.nodes import Node
from tests.soak.schedule import PlannedFailure, RoundPlan
from tests.soak.storage import Storage

# While a failure waits for a checkpoint that is being written, which takes some ten milliseconds.
SAVING_TICK_SECONDS = 0.003
SAVING_SECONDS = 8.0
"""For which a failure waits for a checkpoint."""
PROGRESS_SECONDS = 300.0
"""In which a step must be done, whatever has failed."""


@dataclass
class Active:
    """A failure that has not ended, or from which the run has not recovered."""

    failure: Failure
    effect: Effect
    undone: bool = False


class Supervisor(Job):
    """Trains through the failures of a plan.

    Args:
        storage: shared storage, which holds the run folder.
        data: data set, which may be damaged.
        say: prints a line.
        options: see `Job`.
    """

    def __init__(
        self, plan: RoundPlan, nodes: list[Node], *, folder: Path, storage: Storage, run: Path, data: Path,
        options: list[str], pace: float, say: Callable[[str], None],
    ) -> None:  # fmt: skip
        super().__init__(nodes, world=plan.world, folder=folder, run=run, options=options, pace=pace)
        self.storage, self.data, self._say = storage, data, say
        self.failures: list[Failure] = []
        self.damaged: set[int] = set()
        """Ids of the damaged samples."""
        self.moved_saves = False
        """Whether there was a failure that moves saves, see `Kind`."""
        self._planned, self._active = list(plan.failures), list[Active]()
        self._injected_at = self._progress_at = time.monotonic()
        self._reached = 0  # steps done, without those that were repeated
        self._seen = 0  # steps in the records that `_observe` has read
        self._with_steps: set[int] = set()  # starts that have done a step
        self._saving_since: float | None = None

    def damage_samples(self, ids: list[int]) -> None:
        self.damaged |= set(ids)

    def train(self) -> None:
        """Train to the end, whatever fails."""
        try:
            while not self.finished:
                if not self.pids:
                    self.start(self._undo)
                self._observe()
                self._undo()
                self._inject()
                if self.check_exits(kill_at=self._kill_at()):
                    self._undo()
                    self.records.update()
                    self.end()
                if time.monotonic() - self._progress_at > PROGRESS_SECONDS:
                    raise RoundFailed(f"no step was done for {PROGRESS_SECONDS:.0f} s; ranks {self.running()} run")
                time.sleep(TICK_SECONDS if self._saving_since is None else SAVING_TICK_SECONDS)
        except RoundFailed as error:
            self.violations.append(str(error))
        finally:
            try:
                self.kill_everything()
            finally:
                self._undo(everything=True)
        self._observe()
        for active in self._active:  # nothing was left to do but to finish
            failure = active.failure
            if not failure.settled:
                failure.seconds_to_recover = time.monotonic() - failure.time
            failure.seconds_to_catch_up = failure.seconds_to_catch_up or failure.seconds_to_recover

    def _observe(self) -> None:
        """Read the records, and settle the failures from which the run has recovered."""
        self.records.update(first=len(self.starts) - 2)  # earlier starts write nothing any more
        steps = self.records.steps
        for done in steps[self._seen :]:
            if done.start not in self._with_steps:
                self._with_steps.add(done.start)
                self._note_loss(done.start)
            self._reached, self._progress_at = done.step + 1, time.monotonic()
        self._seen = len(steps)
        for active in list(self._active):
            failure = active.failure
            failure.detail = active.effect.detail  # some know it only later
            recent = [done for done in steps if done.time > failure.time]
            settle(failure, recent)
            caught_up(failure, failure.step, recent)
            if failure.seconds_to_catch_up is not None:
                self._active.remove(active)
                self.log("recovered", **asdict(failure))

    def _note_loss(self, start: int) -> None:
        """Attribute the steps that a start repeats to a failure."""
        first = self.records.first_step(start)
        assert first is not None
        lost = self._reached - first
        if start == 0 or lost <= 0:
            return
        unsettled = [active.failure for active in self._active if not active.failure.settled]
        if not attribute_loss(lost, unsettled):
            self.violations.append(f"start {start} repeats {lost} steps, but no failure had happened")
        damaged = any(failure.kind == "damaged checkpoint" for failure in unsettled)
        trained = start - 1 in self._with_steps
        if had_saved(self.starts[start - 1].status, trained=trained) and not damaged:
            self.violations.append(f"start {start} repeats {lost} steps, although start {start - 1} had saved")

    def _undo(self, *, everything: bool = False) -> None:
        """End the failures whose time is over, or all."""
        for active in self._active:
            effect, failure = active.effect, active.failure
            if effect.seconds is None:
                over = not [rank for rank in self.running() if self.pids[rank] not in effect.stopped]
            else:
                over = time.monotonic() >= failure.time + effect.seconds
            if not active.undone and (over or everything):
                effect.undo()
                active.undone, failure.ended = True, time.monotonic()

    def _kill_at(self) -> float | None:
        """Return when SLURM would kill the ranks of the present start."""
        number = self.starts[-1].number
        of_start = [active for active in self._active if active.failure.start == number]
        return min((a.failure.time + a.effect.kill_after for a in of_start if a.effect.kill_after), default=None)

    def _inject(self) -> None:
        if not self._planned or not self.running() or not self._is_due(self._planned[0]):
            return
        planned = self._planned.pop(0)
        self._saving_since = None
        kind, now = planned.kind, time.monotonic()
        phase = "start-up" if not self.trains() else "saving" if self._saves() else "training"
        effect = INJECT[kind.name](self, Random(planned.seed))
        self._injected_at = time.monotonic()
        failure = Failure(
            len(self.failures), kind.name, kind.ends_start, effect.detail, phase, self.starts[-1].number, now,
            step=self._reached,
        )  # fmt: skip
        self.failures.append(failure)
        self._active.append(Active(failure, effect))
        self.moved_saves |= kind.moves_saves
        self.log("failure", trigger=planned.trigger, **asdict(failure))
        self._say(f"step {self._reached:4d}  {kind.name}: {effect.detail} ({phase})")

    def _is_due(self, planned: PlannedFailure) -> bool:
        """Return whether a failure should happen now."""
        if planned.trigger == "overlap":
            return time.monotonic() - self._injected_at >= planned.after
        if planned.trigger == "start-up":
            previous, started = self.failures[-1], self.starts[-1]
            in_start = started.number > previous.start and time.monotonic() - started.time >= planned.after
            return in_start or (self.trains() and previous.settled)
        before = self.failures[-1].step if self.failures else 0
        recovers = any(not active.failure.settled and active.failure.ends_start for active in self._active)
        if recovers or not self.trains() or self._reached < before + planned.after:
            return False
        if planned.trigger == "saving" and not self._saves():
            self._saving_since = self._saving_since or time.monotonic()
            return time.monotonic() - self._saving_since > SAVING_SECONDS
        return True

    def _saves(self) -> bool:
        """Return whether a checkpoint is being written."""
        local = self.nodes[self.placement[0]].local
        with contextlib.suppress(OSError):
            folders = [self.run / "checkpoints", *local.glob("*/*/after-*")]
            return any(name.endswith(".tmp") for folder in folders if folder.is_dir() for name in os.listdir(folder))
        return False

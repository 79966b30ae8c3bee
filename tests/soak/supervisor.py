"""One round of a soak: starts the ranks, lets failures happen, and starts them again, as a job in SLURM would be.

A start whose rank fails is started again at once on the same nodes. As `srun --kill-on-bad-exit` does, the ranks that
have not taken their first step yet are then killed, because they would wait half an hour for the others. Later they
must end by themselves.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random

from launch.run.status import EXIT_STATUS, read_status
from tests.soak.accounting import Failure, attribute_loss, caught_up, settle
from tests.soak.failures import INJECT, Allocation, Effect
from tests.soak.nodes import Node, wait_for_silence
from tests.soak.ranks import HANG_TIMEOUT, start_ranks
from tests.soak.records import Records
from tests.soak.schedule import PlannedFailure, RoundPlan
from tests.soak.storage import Storage

TICK_SECONDS = 0.02
# While a failure waits for a checkpoint that is being written, which takes some ten milliseconds.
SAVING_TICK_SECONDS = 0.003
SAVING_SECONDS = 8.0
"""For which a failure waits for a checkpoint."""
START_UP_GRACE_SECONDS = 2.0
END_SECONDS = HANG_TIMEOUT + 90.0
"""In which all ranks must end after one has ended: they notice it at once, or after the hang timeout."""
SILENCE_SECONDS = 30.0
PROGRESS_SECONDS = 300.0
"""In which a step must be done, whatever has failed."""
MAX_FAILED_STARTS = 12
RESTART_SECONDS = 0.3
# Finished; failed; ended on request or by the watchdog; killed. Not 2, which means invalid input.
ALLOWED_STATUSES = (0, 1, EXIT_STATUS, -signal.SIGKILL)


class RoundFailed(Exception):
    """The round cannot go on."""


@dataclass
class Active:
    """A failure that is being waited for."""

    failure: Failure
    effect: Effect
    undone: bool = False
    reached: int = 0
    """Steps done before the failure, which the run must do again."""


@dataclass
class Started:
    """A start of the ranks."""

    number: int
    time: float
    world: int
    statuses: dict[int, int] = field(default_factory=dict)
    first_end: float | None = None
    ended_by: str = ""
    """Why the supervisor has killed ranks."""


class Supervisor:
    """Runs one round.

    Args:
        plan: plan of the round.
        nodes: nodes for the ranks; the first `plan.world` are used at first.
        folder: folder for records and logs.
        storage: shared storage, which holds the run folder `run`.
        data: data set, which may be damaged.
        options: options of launch/train.py.
        pace: minimum duration of a step in seconds.
    """

    def __init__(
        self, plan: RoundPlan, nodes: list[Node], *, folder: Path, storage: Storage, run: Path, data: Path,
        options: list[str], pace: float, say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.plan, self.nodes, self.folder, self.storage, self.run, self.data = plan, nodes, folder, storage, run, data
        self._options, self._pace, self._say = options, pace, say
        self.records = Records(folder / "records")
        self.logs = folder / "logs"
        for created in (self.records.folder, self.logs):
            created.mkdir(parents=True)
        self.placement: list[int] = []
        self.next = Allocation(list(range(plan.world)))
        self.pids: dict[int, int] = {}
        self.starts: list[Started] = []
        self.failures: list[Failure] = []
        self.damaged: set[int] = set()
        self.violations: list[str] = []
        self.extra_saves = False
        """Whether the run may have been saved at steps at which an undisturbed one is not."""
        self._active: list[Active] = []
        self._planned = list(plan.failures)
        self._injected_at = time.monotonic()
        self._reached = 0  # steps done, without those that were repeated
        self._progress_at = time.monotonic()
        self._seen = 0
        self._saving_since: float | None = None
        self._failed_starts = 0
        self._last_first: dict[int, int] = {}

    # -- what failures use

    def running(self) -> list[int]:
        return [rank for rank in self.pids if self._status(rank) is None]

    def damage_samples(self, ids: list[int]) -> None:
        self.damaged |= set(ids)

    # -- the loop

    def train(self) -> None:
        """Train to the end, whatever fails."""
        try:
            while not self._finished():
                if not self.pids:
                    self._start()
                self._observe()
                self._undo()
                self._inject()
                self._end()
                if time.monotonic() - self._progress_at > PROGRESS_SECONDS:
                    raise RoundFailed(f"no step was done for {PROGRESS_SECONDS:.0f} s; the ranks are {self._states()}")
                time.sleep(SAVING_TICK_SECONDS if self._saving_since is not None else TICK_SECONDS)
        except RoundFailed as error:
            self.violations.append(str(error))
        finally:
            self._clean_up()
        self._observe()
        now = time.monotonic()
        for active in self._active:  # nothing was left to do but to finish
            failure = active.failure
            failure.ended = failure.ended or now
            if not failure.settled:
                failure.seconds_to_recover = now - failure.time
            failure.seconds_to_catch_up = failure.seconds_to_catch_up or failure.seconds_to_recover
        self._active.clear()

    def _finished(self) -> bool:
        return bool(self.starts) and not self.pids and self._ended_well

    _ended_well = False

    def _start(self) -> None:
        allocation = self.next
        if allocation.wait:
            self._sleep(allocation.wait)
        for function in allocation.before:
            function()
        if allocation.wipe:
            for node in self.nodes:
                node.wipe()
        (self.run / "PREEMPT").unlink(missing_ok=True)  # as train.sbatch does
        self.placement = allocation.placement
        self.next = Allocation(list(self.placement))
        used = [self.nodes[index] for index in self.placement]
        started = Started(len(self.starts), time.monotonic(), len(used))
        self.starts.append(started)
        self.pids = start_ranks(
            used, number=started.number, records=self.records.folder, logs=self.logs, pace=self._pace,
            options=self._options,
        )  # fmt: skip
        self._log("start", number=started.number, nodes=[node.name for node in used])

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._undo()
            time.sleep(TICK_SECONDS)

    def _observe(self) -> None:
        """Read the records, and settle the failures from which the run has recovered."""
        self.records.update(first=len(self.starts) - 2)  # earlier starts write nothing any more
        steps = self.records.steps
        for done in steps[self._seen :]:
            if done.start not in self._last_first:
                self._first_step_of(done.start)
            self._reached = done.step + 1
            self._progress_at = time.monotonic()
            self._failed_starts = 0
        self._seen = len(steps)
        for active in list(self._active):
            recent = [done for done in steps if done.time > active.failure.time]
            active.failure.detail = active.effect.detail  # some know it only later
            settle(active.failure, recent)
            caught_up(active.failure, active.reached, recent)
            if active.failure.settled and active.failure.seconds_to_catch_up is not None:
                self._active.remove(active)
                self._log("recovered", **asdict(active.failure))

    def _first_step_of(self, start: int) -> None:
        """Attribute the steps that a start repeats to a failure."""
        first = self.records.first_step(start)
        assert first is not None
        self._last_first[start] = first
        lost = self._reached - first
        if start and lost > 0:
            unsettled = [active.failure for active in self._active if not active.failure.settled]
            if not attribute_loss(lost, unsettled):
                self.violations.append(f"start {start} repeats {lost} steps, but no failure had happened")

    def _undo(self) -> None:
        now = time.monotonic()
        for active in self._active:
            effect, failure = active.effect, active.failure
            if active.undone:
                continue
            alone = not [rank for rank in self.running() if self.pids[rank] not in effect.stopped]
            if alone if effect.seconds is None else now >= failure.time + effect.seconds:
                effect.undo()
                active.undone, failure.ended = True, time.monotonic()

    def _inject(self) -> None:
        if not self._planned or not self.running() or not self._is_due(self._planned[0]):
            return
        planned = self._planned.pop(0)
        self._saving_since = None
        phase = "start-up" if not self._trains() else "saving" if self._saves() else "training"
        now = time.monotonic()
        effect = INJECT[planned.kind.name](self, Random(planned.seed))
        self._injected_at = time.monotonic()
        failure = Failure(
            len(self.failures), planned.kind.name, planned.kind.ends_start, effect.detail, phase,
            self.starts[-1].number, now, step=self._reached,
        )  # fmt: skip
        self.failures.append(failure)
        self._active.append(Active(failure, effect, reached=self._reached))
        self.extra_saves |= planned.kind.name in ("preemption", "node added", "node removed")
        self._log("failure", trigger=planned.trigger, **asdict(failure))
        self._say(f"step {self._reached:4d}  {planned.kind.name}: {effect.detail} ({phase})")

    def _is_due(self, planned: PlannedFailure) -> bool:
        """Return whether a failure should happen now."""
        if planned.trigger == "overlap":
            return time.monotonic() - self._injected_at >= planned.after
        if planned.trigger == "start-up":
            previous, started = self.failures[-1], self.starts[-1]
            in_start = started.number > previous.start and time.monotonic() - started.time >= planned.after
            return in_start or (self._trains() and previous.settled)
        before = self.failures[-1].step if self.failures else 0
        recovers = any(not active.failure.settled and active.failure.ends_start for active in self._active)
        if recovers or not self._trains() or self._reached < before + planned.after:
            return False
        if planned.trigger == "saving" and not self._saves():
            self._saving_since = self._saving_since or time.monotonic()
            return time.monotonic() - self._saving_since > SAVING_SECONDS
        return True

    def _trains(self) -> bool:
        """Return whether this start has done a step."""
        return any(done.start == self.starts[-1].number for done in self.records.steps[-1:])

    def _saves(self) -> bool:
        """Return whether a checkpoint is being written."""
        local = self.nodes[self.placement[0]].local
        folders = [self.run / "checkpoints", *local.glob("*/*/after-*")]
        with contextlib.suppress(OSError):
            return any(name.endswith(".tmp") for folder in folders if folder.is_dir() for name in os.listdir(folder))
        return False

    def _end(self) -> None:
        """Handle ranks that have ended."""
        started, now = self.starts[-1], time.monotonic()
        for rank in self.pids:
            status = self._status(rank)
            if status is not None and rank not in started.statuses:
                started.statuses[rank] = status
                started.first_end = started.first_end or now
        if self.running():
            self._kill_if_late(started)
        else:
            self._undo()
            self._after_end(started)

    def _kill_if_late(self, started: Started) -> None:
        """Kill the ranks that still run although they should have ended."""
        now = time.monotonic()
        of_start = [active for active in self._active if active.failure.start == started.number]
        kill_at = [a.failure.time + a.effect.kill_after for a in of_start if a.effect.kill_after is not None]
        since_end = 0.0 if started.first_end is None else now - started.first_end
        if since_end > START_UP_GRACE_SECONDS and not self._trains():
            self._kill("a rank has failed before the first step")
        elif since_end > END_SECONDS:
            self.violations.append(
                f"start {started.number}: ranks {self.running()} still run {END_SECONDS:.0f} s after another rank has "
                f"ended; statuses {started.statuses}"
            )
            self._kill("they did not end")
        elif kill_at and now > min(kill_at):
            self._kill(f"the run did not stop within the grace period; its ranks are {self._states()}")

    def _after_end(self, started: Started) -> None:
        """Check what has ended, and decide whether the run is started again."""
        self.records.update()
        statuses = list(started.statuses.values())
        self._log("end", number=started.number, statuses=started.statuses, status=read_status(self.run),
                  killed=started.ended_by)  # fmt: skip
        for rank, status in started.statuses.items():
            if status not in ALLOWED_STATUSES:
                log = (self.logs / f"start-{started.number}-rank-{rank}.log").read_text(errors="replace")
                last = log.strip().rpartition("\n")[2]
                self.violations.append(f"start {started.number}: rank {rank} ended with status {status}: {last}")
        if remaining := wait_for_silence(self.nodes, SILENCE_SECONDS):
            names = [f"{pid} {_command(pid)}" for pid in remaining]
            self.violations.append(f"start {started.number}: processes remain after the ranks have ended: {names}")
            for node in self.nodes:
                node.kill()
        self.pids = {}
        self._ended_well = all(status == 0 for status in statuses) and read_status(self.run) == "finished"
        if not self._ended_well:
            self._failed_starts += 1
            if self._failed_starts > MAX_FAILED_STARTS:
                raise RoundFailed(f"{MAX_FAILED_STARTS} starts in a row did no step; see {self.logs}")
            self._sleep(RESTART_SECONDS)

    def _kill(self, reason: str) -> None:
        self.starts[-1].ended_by = reason
        for node in self.nodes:
            node.kill()

    def _clean_up(self) -> None:
        """End everything that still runs, and every failure that still acts."""
        for node in self.nodes:
            node.kill()
        wait_for_silence(self.nodes, SILENCE_SECONDS)
        for active in self._active:
            if not active.undone:
                active.effect.undo()
                active.undone, active.failure.ended = True, time.monotonic()

    def _status(self, rank: int) -> int | None:
        return self.nodes[self.placement[rank]].status(self.pids[rank])

    def _states(self) -> dict[int, str]:
        return {rank: "running" if self._status(rank) is None else "ended" for rank in self.pids}

    def _log(self, event: str, **values: object) -> None:
        with (self.folder / "events.jsonl").open("a") as file:
            file.write(json.dumps({"time": round(time.monotonic(), 3), "event": event, **values}) + "\n")


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:200]
    except OSError:
        return "(ended)"

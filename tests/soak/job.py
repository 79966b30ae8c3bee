"""The ranks of a run, which are started, and started again, as a job in SLURM would do it.

A start that has failed is followed by another one at once, on the same nodes. As with `srun --kill-on-bad-exit`, ranks
that have not done their first step yet are killed when another rank has ended, because they would wait half an hour for
it. Later they must end by themselves.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from launch.run.status import EXIT_STATUS, read_status
from tests.soak.nodes import SILENCE_SECONDS, Node, wait_for_silence
from tests.soak.ranks import HANG_TIMEOUT, start_ranks
from tests.soak.records import Records

TICK_SECONDS = 0.02
START_UP_GRACE_SECONDS = 2.0
END_SECONDS = HANG_TIMEOUT + 90.0
"""In which all ranks must end after one has ended: they notice it at once, or after the hang timeout."""
MAX_FAILED_STARTS = 12
RESTART_SECONDS = 0.3
# Finished; failed; ended on request or by the watchdog; killed. Not 2, which means invalid input.
ALLOWED_STATUSES = (0, 1, EXIT_STATUS, -signal.SIGKILL)
# In addition, before training has started: stopped by the signals of a preemption.
STOPPED_EARLY = (128 + signal.SIGTERM, 128 + signal.SIGUSR2)


class RoundFailed(Exception):
    """The round cannot be continued."""


@dataclass
class Allocation:
    """How the next start is done."""

    placement: list[int]
    """Node of every rank."""
    wait: float = 0.0
    """Seconds to wait first, as in the queue of a scheduler."""
    wipe: bool = False
    """Whether the node-local storage is lost."""
    before: list[Callable[[], None]] = field(default_factory=list)
    """Called when nothing runs any more, before the start."""


@dataclass
class Start:
    """A start of the ranks."""

    number: int
    time: float
    exits: dict[int, int] = field(default_factory=dict)
    """Exit statuses by rank (negative: a signal)."""
    first_exit: float | None = None
    killed: str = ""
    """Why ranks were killed that should have ended by themselves."""
    status: str | None = None
    """RUN/status after its end."""


class Job:
    """Starts and ends the ranks of a run.

    Args:
        nodes: nodes for the ranks; the first `world` are used at first.
        world: number of ranks of the first start.
        folder: folder for records, logs and events.
        run: run folder.
        options: options of launch/train.py.
        pace: minimum duration of a step in seconds.
    """

    def __init__(
        self, nodes: list[Node], *, world: int, folder: Path, run: Path, options: list[str], pace: float
    ) -> None:
        self.nodes, self.folder, self.run = nodes, folder, run
        self._options, self._pace = options, pace
        self.records, self.logs = Records(folder / "records"), folder / "logs"
        for created in (self.records.folder, self.logs):
            created.mkdir(parents=True)
        self.placement: list[int] = []
        """Node of every rank of the present or last start."""
        self.next = Allocation(list(range(world)))
        self.pids: dict[int, int] = {}
        """Process ids by rank; empty: nothing runs."""
        self.starts: list[Start] = []
        self.finished = False
        self.violations: list[str] = []
        self._fruitless = 0  # starts since the last step

    def running(self) -> list[int]:
        """Return the ranks that are running."""
        return [rank for rank in self.pids if self._exit(rank) is None]

    def trains(self) -> bool:
        """Return whether the present start has done a step."""
        return any(done.start == self.starts[-1].number for done in self.records.steps[-1:])

    def start(self, meanwhile: Callable[[], None]) -> None:
        """Start the ranks. `meanwhile` is called again and again while the start waits in the queue."""
        allocation = self.next
        pause(max(allocation.wait, RESTART_SECONDS if self.starts else 0.0), meanwhile)
        for function in allocation.before:
            function()
        if allocation.wipe:
            for node in self.nodes:
                node.wipe()
        (self.run / "PREEMPT").unlink(missing_ok=True)  # as train.sbatch does
        self.placement = allocation.placement
        self.next = Allocation(list(self.placement))
        used = [self.nodes[index] for index in self.placement]
        self.starts.append(Start(len(self.starts), time.monotonic()))
        number = self.starts[-1].number
        self.pids = start_ranks(
            used, number=number, records=self.records.folder, logs=self.logs, pace=self._pace, options=self._options
        )
        self.log("start", number=number, nodes=[node.name for node in used])

    def check_exits(self, *, kill_at: float | None) -> bool:
        """Note which ranks have ended; return whether all have.

        Args:
            kill_at: when SLURM would kill all ranks; None: never.
        """
        started, now = self.starts[-1], time.monotonic()
        for rank in self.pids:
            found = self._exit(rank)
            if found is not None and rank not in started.exits:
                started.exits[rank] = found
                started.first_exit = started.first_exit or now
        if not self.running():
            return True
        since = 0.0 if started.first_exit is None else now - started.first_exit
        if since > START_UP_GRACE_SECONDS and not self.trains():
            self._kill("a rank has ended before the first step")
        elif since > END_SECONDS:
            self.violations.append(
                f"start {started.number}: ranks {self.running()} still run {END_SECONDS:.0f} s after another rank has "
                f"ended; statuses {started.exits}"
            )
            self._kill("they did not end")
        elif kill_at is not None and now > kill_at:
            self._kill("the run did not stop within the grace period")
        return False

    def end(self) -> None:
        """Check what a start whose ranks have ended has left."""
        started = self.starts[-1]
        started.status = read_status(self.run)
        self.log("end", number=started.number, exits=started.exits, status=started.status, killed=started.killed)
        allowed = ALLOWED_STATUSES if self.trains() else ALLOWED_STATUSES + STOPPED_EARLY
        for rank, found in started.exits.items():
            if found not in allowed:
                log = (self.logs / f"start-{started.number}-rank-{rank}.log").read_text(errors="replace")
                last = log.strip().rpartition("\n")[2]
                self.violations.append(f"start {started.number}: rank {rank} ended with status {found}: {last}")
        if remaining := wait_for_silence(self.nodes, SILENCE_SECONDS):
            names = [f"{pid} {_command(pid)}" for pid in remaining]
            self.violations.append(f"start {started.number}: processes remain after the ranks have ended: {names}")
            self.kill_everything()
        self._fruitless = 0 if self.trains() else self._fruitless + 1
        self.pids = {}
        self.finished = not any(started.exits.values()) and started.status == "finished"
        if self._fruitless > MAX_FAILED_STARTS:
            raise RoundFailed(f"{MAX_FAILED_STARTS} starts in a row did no step; see {self.logs}")

    def kill_everything(self) -> None:
        """Kill all processes of all nodes."""
        for node in self.nodes:
            node.kill()
        wait_for_silence(self.nodes, SILENCE_SECONDS)

    def log(self, event: str, **values: object) -> None:
        """Write a line to events.jsonl."""
        with (self.folder / "events.jsonl").open("a") as file:
            file.write(json.dumps({"time": round(time.monotonic(), 3), "event": event, **values}) + "\n")

    def _kill(self, reason: str) -> None:
        self.starts[-1].killed = reason
        for node in self.nodes:
            node.kill()

    def _exit(self, rank: int) -> int | None:
        return self.nodes[self.placement[rank]].status(self.pids[rank])


def pause(seconds: float, meanwhile: Callable[[], None]) -> None:
    """Wait, and call `meanwhile` again and again."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        meanwhile()
        time.sleep(TICK_SECONDS)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:200]
    except OSError:
        return "(ended)"

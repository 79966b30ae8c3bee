"""Goodput of a run: the fraction of its wall time in which it trained, and where the rest went (`pipeline goodput`).

The categories follow ml-goodput-measurement (github.com/AI-Hypercomputer/ml-goodput-measurement); docs/metrics.md
compares them. Everything is computed from RUN/metrics.jsonl.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import inf
from statistics import median
from typing import Any

from launch.run.metrics_file import first_step, kept_steps, starts
from launch.run.metrics_schema import EVALUATIONS

TRAINING, WAITING, EVALUATION = "training", "waiting for data", "evaluation"
SAVING, RESTORE, STARTUP = "saving checkpoints", "restoring checkpoints", "start-up"
LOST, DOWN, QUEUED, OTHER = "lost steps", "down time", "waiting in the queue", "other"
# Category -> its name in ml-goodput-measurement, which calls categories of its users' own custom events.
BADPUT_TYPES = {
    WAITING: "DATA_LOADING_SYNC",
    SAVING: "UNPRODUCTIVE_CHECKPOINT_SAVE_TIME",
    RESTORE: "UNPRODUCTIVE_CHECKPOINT_RESTORE_TIME",
    STARTUP: "PROGRAM_STARTUP",
    LOST: "WASTED_PROGRESS_FROM_DISRUPTION",
    DOWN: "INFRASTRUCTURE_RECOVERY_FROM_DISRUPTION",
    OTHER: "OTHER",
}
CUSTOM_BADPUT_EVENTS = {EVALUATION: "EVAL_STEP", QUEUED: "QUEUED"}
CATEGORIES = (TRAINING, WAITING, EVALUATION, SAVING, RESTORE, STARTUP, LOST, DOWN, QUEUED, OTHER)
FINISHED = "finished"
CLOCK_TOLERANCE = 2.0
"""Seconds by which times may go back without a note. The kernel gives the start of a process with an error of 1 s."""

Line = Mapping[str, Any]


@dataclass(frozen=True)
class StartGoodput:
    """One start of a run."""

    number: int
    """1 for the first start."""
    first_step: int
    """Optimizer steps done before this start."""
    last_step: int
    """Optimizer steps done at its end, as far as known."""
    lost_steps: int
    """Steps of this start that a later start repeated."""
    world: int | None
    """Number of ranks; None: the "start" line is missing."""
    ended: str
    """How it ended: finished, preempted (reason) or killed; for the last start also another status."""
    wall: float
    """Seconds from the start of its processes to its end."""
    training: float
    """Seconds of training that no later start repeated."""

    @property
    def goodput(self) -> float:
        """Fraction of the wall time of this start."""
        return self.training / self.wall if self.wall else 0.0


@dataclass(frozen=True)
class Goodput:
    """Where the wall time of a run went."""

    categories: dict[str, float]
    """Seconds of each of CATEGORIES, in that order. Their sum is `wall`."""
    starts: list[StartGoodput]
    notes: tuple[str, ...] = ()
    """Facts about the metrics that make these figures less certain."""

    @property
    def wall(self) -> float:
        """Seconds from the beginning of the first start to the last line, without those between the end of a finished
        run and the start that extends it."""
        return sum(self.categories.values())

    @property
    def goodput(self) -> float:
        """Fraction of the wall time that was training."""
        return self.fractions[TRAINING]

    @property
    def fractions(self) -> dict[str, float]:
        """Fraction of the wall time of each category."""
        wall = self.wall
        return {name: seconds / wall if wall else 0.0 for name, seconds in self.categories.items()}

    @property
    def lost_steps(self) -> int:
        """Number of optimizer steps that were done more than once."""
        return sum(start.lost_steps for start in self.starts)

    @property
    def running(self) -> bool:
        """Whether the run is still running, according to RUN/status."""
        return self.starts[-1].ended == "running"

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON object with the names of ml-goodput-measurement."""
        seconds = {name: round(value, 3) for name, value in self.categories.items()}
        badput: dict[str, Any] = {BADPUT_TYPES[name]: value for name, value in seconds.items() if name in BADPUT_TYPES}
        badput["CUSTOM_BADPUT_EVENTS"] = {name: seconds[category] for category, name in CUSTOM_BADPUT_EVENTS.items()}
        return {
            "goodput": round(self.goodput, 6),
            "total_elapsed_time": round(sum(seconds.values()), 3),
            "goodput_time": {"TOTAL": seconds[TRAINING]},
            "badput_time": badput,
            "max_productive_step": max(start.last_step for start in self.starts),
            "lost_steps": self.lost_steps,
            "disruption_count": sum(start.ended != FINISHED for start in self.starts[:-1]),
            "running": self.running,
            "starts": [asdict(start) | {"goodput": round(start.goodput, 6)} for start in self.starts],
            "notes": list(self.notes),
        }


def goodput(lines: Sequence[dict[str, Any]], *, status: str | None = None, alive: float | None = None) -> Goodput:
    """Return where the wall time of a run went.

    Args:
        lines: all lines of its metrics, in the order of the file; at least one.
        status: status of the last start, from RUN/status.
        alive: Unix time at which the last start renewed RUN/status.
    """
    found = starts(lines)
    typical = [seconds for start in found for seconds in _step_seconds(start)]
    done: list[_Start] = []
    for start, kept, following in zip(found, kept_steps(found), [*found[1:], None], strict=True):
        spent = _Start(start, kept, typical, done[-1] if done else None)
        if following is None:
            spent.close(status=status, alive=alive)
        else:
            spent.close_before(following)
        done.append(spent)
    total = {name: sum(spent.categories[name] for spent in done) for name in CATEGORIES}
    notes = tuple(f"start {number}: {note}" for number, spent in enumerate(done, 1) for note in spent.notes)
    return Goodput(total, [spent.summary(number) for number, spent in enumerate(done, 1)], notes)


class _Start:
    """Divides the time of one start among the categories.

    The time that passes between two lines is collected in `_open`, from which each line takes the duration that it
    reports. So no time is counted twice, and what no line reports remains.

    Args:
        kept: last step that no later start repeated.
        typical: durations of steps of the whole run.
        previous: the previous start; None: there is none.
    """

    def __init__(self, lines: Sequence[Line], kept: float, typical: Sequence[float], previous: _Start | None) -> None:
        self._lines, self._kept = lines, kept
        self._head = lines[0] if lines[0]["kind"] == "start" else {}
        steps = _step_seconds(lines) or typical
        self._step_seconds = median(steps) if steps else None
        self.categories = dict.fromkeys(CATEGORIES, 0.0)
        self.notes: list[str] = []
        self.time: float = self._begin(-inf if previous is None else previous.time)
        if previous is not None and previous.ended == FINISHED:
            self.categories[DOWN] = 0.0  # nothing was left to do until the run was extended or returned to a checkpoint
        self._open = 0.0
        self._stepped = False
        self._step = first_step(lines)
        self._lost_steps = 0
        self.ended: str = ""
        for line in lines:
            passed = line["time"] - self.time
            self._note_clock(passed)
            self._open += passed if passed >= 0 else _duration(line)
            self.time = line["time"]
            self._add(line)

    def _begin(self, ended_at: float) -> float:
        """Return the time at which the processes were started, and add the time before it."""
        first = self._lines[0]
        begin = self._head.get("started", first["time"] - _duration(first))
        if ended_at - CLOCK_TOLERANCE <= begin < ended_at:
            begin = ended_at
        begin = min(begin, first["time"])
        queued = self._head.get("queued")
        self.categories[QUEUED] = 0.0 if queued is None else max(0.0, begin - max(queued, ended_at))
        if ended_at > -inf:
            self._note_clock(begin - ended_at)
            self.categories[DOWN] = max(0.0, begin - ended_at - self.categories[QUEUED])
        return float(begin)

    def _note_clock(self, passed: float) -> None:
        """Add a note if a time is clearly earlier than the time before it."""
        if passed < -CLOCK_TOLERANCE:
            self.notes.append(f"the clock went back by {-passed:,.0f} s; its durations are estimates")

    def _take(self, seconds: float = inf) -> float:
        taken = min(seconds, self._open)
        self._open -= taken
        return taken

    def _add(self, line: Line) -> None:
        kind, step, spent = line["kind"], line.get("step", 0), self.categories
        self._step = max(self._step, step)
        if kind == "start":
            if step:  # there was a checkpoint to restore
                spent[RESTORE] += self._take(line.get("restore_seconds", 0.0))
            spent[STARTUP] += self._take()
        elif kind == "train":
            self._add_interval(line)
        elif kind in EVALUATIONS:
            spent[LOST if step > self._kept else EVALUATION] += self._take(_duration(line))
        elif kind == "checkpoint":
            spent[LOST if step > self._kept else SAVING] += self._take(_duration(line))
        elif kind == "stop":
            self.ended = f"preempted ({line['reason']})"
        elif kind == "end":
            self.ended = FINISHED
            spent[SAVING] += self._take()  # the last checkpoint and the weights have been written

    def _add_interval(self, line: Line) -> None:
        """Divide an interval of steps. Until its first step, a start is starting up."""
        interval = self._take(line["seconds"])
        self.categories[OTHER if self._stepped else STARTUP] += self._take()
        self._stepped = True
        first = line.get("first_step_seconds")
        if first is not None and self._step_seconds is not None:
            excess = min(interval, max(0.0, first - self._step_seconds))
            self.categories[STARTUP] += excess
            interval -= excess
        repeated = min(line["steps"], max(0, line["step"] - self._kept))
        self._lost_steps += int(repeated)
        lost = interval * repeated / line["steps"]
        waiting = (interval - lost) * line["data_wait"]
        self.categories[LOST] += lost
        self.categories[WAITING] += waiting
        self.categories[TRAINING] += interval - lost - waiting

    def close_before(self, following: Sequence[Line]) -> None:
        """Add the time from the last line to the end of this start, after which a run was resumed."""
        if not self.ended:
            self.ended = "killed"
            self._add_unlogged(following[0].get("previous_alive"), following[0].get("previous_step"))
        elif self.ended != FINISHED:
            kinds = [line["kind"] for line in following if line["kind"] in {"train", *EVALUATIONS}]
            repeats_evaluation = next(iter(kinds), "") in EVALUATIONS  # this one did not finish it
            self.categories[LOST if repeats_evaluation else SAVING] += self._take()
        self.categories[OTHER] += self._take()

    def close(self, *, status: str | None, alive: float | None) -> None:
        """Add the time from the last line to the end of the last start; arguments as in `goodput`."""
        if not self.ended:
            self.ended = status or "unknown"
            if self.ended != "running" or not self._stepped:
                self._add_unlogged(alive, None)
        elif self.ended != FINISHED:
            self.categories[SAVING] += self._take()
        self.categories[OTHER] += self._take()

    def _add_unlogged(self, alive: float | None, step: int | None) -> None:
        """Add work without a line until `alive`, after which the start was killed at `step`."""
        if alive is not None and alive > self.time:
            self._open += alive - self.time
            self.time = alive
        unlogged = max(0, (step or 0) - self._step)
        if not self._stepped:  # the time before the first line is that of its steps, and start-up
            self.categories[LOST] += self._take(unlogged * (self._step_seconds or 0.0))
        self.categories[LOST if self._stepped else STARTUP] += self._take()
        self._lost_steps += unlogged
        self._step += unlogged

    def summary(self, number: int) -> StartGoodput:
        return StartGoodput(
            number=number,
            first_step=first_step(self._lines),
            last_step=self._step,
            lost_steps=self._lost_steps,
            world=self._head.get("world"),
            ended=self.ended,
            wall=sum(seconds for name, seconds in self.categories.items() if name not in (DOWN, QUEUED)),
            training=self.categories[TRAINING],
        )


def _duration(line: Line) -> float:
    """Return the seconds that a line describes, which end at its time."""
    timed = line["kind"] in {"train", "checkpoint", *EVALUATIONS}
    return float(line.get("seconds", 0.0)) if timed else 0.0


def _step_seconds(start: Sequence[Line]) -> list[float]:
    """Return the mean duration of a step in each interval, without the first step of the start."""
    found = []
    for line in start:
        if line["kind"] == "train":
            first = line.get("first_step_seconds")
            steps = line["steps"] - (first is not None)
            if steps:
                found.append(max(0.0, line["seconds"] - (first or 0.0)) / steps)
    return found

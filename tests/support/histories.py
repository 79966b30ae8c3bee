"""Simulate the metrics of runs that are killed, preempted and resumed, together with where their time really went."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from launch.monitor import goodput as categories
from launch.run.metrics_file import starts

STEP, WAIT = 1.0, 0.25  # duration of a step in seconds, and the fraction of it that waits for data
EVALUATION, SAVE, RESTORE, EXPORT = 3.0, 0.5, 2.0, 1.5  # seconds


@dataclass(frozen=True)
class StartPlan:
    """What happens to one start of a run."""

    steps: int
    """Steps until it ends."""
    ended: Literal["killed", "preempted", "evaluating"] = "killed"
    """evaluating: preempted during the evaluation after its last step."""
    startup: float = 5.0
    compile: float = 10.0
    """By how many seconds the first step is longer than the others."""
    down: float = 30.0
    """Seconds before this start in which nothing ran."""
    queue: float = 0.0
    """Seconds before this start in the scheduler's queue."""
    unlogged: float = 0.0
    """Seconds of an incomplete step before it is killed. They count as start-up if no step has been logged."""
    torn: bool = False
    """Whether it is killed before its newest checkpoint is complete."""
    world: int = 1


@dataclass
class History:
    """The lines of a simulated run, and its true times."""

    lines: list[dict[str, Any]] = field(default_factory=list)
    seconds: Counter[str] = field(default_factory=Counter)
    lost_steps: int = 0
    time: float = 1.8e9

    def spend(self, category: str, seconds: float) -> None:
        self.seconds[category] += seconds
        self.time += seconds

    def write(self, kind: str, step: int, **values: Any) -> None:
        self.lines.append({"kind": kind, "time": self.time, "step": step, **values})


def simulate(
    plans: list[StartPlan], *, total: int, log_every: int, save_every: int, eval_every: int | None = None
) -> History:
    """Return the history of a run whose starts follow `plans`; its last start trains up to step `total`."""
    run = _Run(total, log_every, save_every, eval_every)
    for plan in [*plans, StartPlan(steps=total)]:
        run.start(plan)
        if run.saved == total:
            break
    return run.history


class _Run:
    """A simulated run."""

    def __init__(self, total: int, log_every: int, save_every: int, eval_every: int | None) -> None:
        self.history = History()
        self.saved = 0
        """Step of the newest checkpoint."""
        self._older = 0  # step of the checkpoint before it
        self._total, self._log_every, self._save_every, self._eval_every = total, log_every, save_every, eval_every
        self._pending = False  # whether the evaluation of that step has been interrupted
        self._before: dict[str, Any] = {}  # last sign of life of the previous start, if it was killed

    def start(self, plan: StartPlan) -> None:
        """Start the run, and let it train until it ends."""
        history, begin = self.history, self.saved
        if history.lines:
            history.spend(categories.DOWN, plan.down)
        queued = history.time if plan.queue else None
        history.spend(categories.QUEUED, plan.queue)
        times = {"queued": queued, "started": history.time}
        history.spend(categories.STARTUP, plan.startup)
        restore = RESTORE if begin else 0.0
        history.spend(categories.RESTORE, restore)
        history.write("start", begin, **times, world=plan.world, restore_seconds=restore, **self._before)
        self._before = {}
        work = _Work(history)
        if self._pending:
            self._pending = False
            work.evaluate(begin)
            work.save(begin)
        end = min(self._total, begin + plan.steps)
        self._train(plan, work, end)
        if end == self._total:
            history.spend(categories.SAVING, EXPORT)
            history.write("end", end, seconds=1.0, best=None)
        elif plan.ended == "killed":
            if plan.torn and self.saved > begin:
                self.saved = self._older
            work.lose(self.saved)
            logged = any(line["kind"] == "train" for line in starts(history.lines)[-1])
            history.spend(categories.LOST if logged else categories.STARTUP, plan.unlogged)
            history.lost_steps += end - self.saved
            self._before = {"previous_alive": history.time, "previous_step": end}
        else:
            if plan.ended == "evaluating" and end > begin:
                self._pending = True
                history.spend(categories.LOST, EVALUATION / 2)
            history.write("stop", end, reason="SIGTERM")
            self.saved = end

    def _train(self, plan: StartPlan, work: _Work, end: int) -> None:
        begin = logged = self.saved
        for step in range(begin + 1, end + 1):
            compilation = plan.compile if step == begin + 1 else 0.0
            work.train(step, compilation)
            stops = step == end < self._total and plan.ended != "killed"
            evaluates = self._eval_every is not None and step % self._eval_every == 0 and not stops
            saves = not stops and (evaluates or step % self._save_every == 0 or step == self._total)
            if saves or stops or step % self._log_every == 0:
                work.log(step, step - logged, plan.compile if logged == begin else None)
                logged = step
            if evaluates:
                work.evaluate(step)
            if saves:
                work.save(step)
                self._older, self.saved = self.saved, step


class _Work:
    """The work of one start, which is lost if it is killed before it saves."""

    def __init__(self, history: History) -> None:
        self._history = history
        self._unsaved: list[tuple[int, str, float]] = []

    def _spend(self, step: int, category: str, seconds: float) -> None:
        self._history.spend(category, seconds)
        self._unsaved.append((step, category, seconds))

    def train(self, step: int, compilation: float) -> None:
        self._history.spend(categories.STARTUP, compilation)
        self._spend(step, categories.WAITING, WAIT * STEP)
        self._spend(step, categories.TRAINING, (1 - WAIT) * STEP)

    def log(self, step: int, steps: int, compilation: float | None) -> None:
        first = None if compilation is None else STEP + compilation
        seconds = steps * STEP + (compilation or 0.0)
        self._history.write(
            "train", step, steps=steps, seconds=seconds, first_step_seconds=first, data_wait=WAIT, epoch=1, lr=0.1
        )

    def evaluate(self, step: int) -> None:
        self._spend(step, categories.EVALUATION, EVALUATION)
        self._history.write("eval", step, seconds=EVALUATION, top1=0.5, top5=0.9, loss=1.0, samples=10, epoch=1)

    def save(self, step: int) -> None:
        self._spend(step, categories.SAVING, SAVE)
        self._history.write("checkpoint", step, seconds=SAVE)

    def lose(self, kept: int) -> None:
        """Count the work after step `kept` as lost."""
        for step, category, seconds in self._unsaved:
            if step > kept:
                self._history.seconds[category] -= seconds
                self._history.seconds[categories.LOST] += seconds

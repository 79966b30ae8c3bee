"""Metrics: RUN/metrics.jsonl is the truth, the terminal is a view of it.

Losses and norms stay on the device until a line is due, so that no step waits for the log.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from launch.config.recipe import Recipe
from launch.engine.engine import Engine, StepResult
from launch.feed import Feed
from launch.roofline import Roofline
from launch.run.metrics_file import MetricsLog
from launch.run.progress import Progress, Scored
from launch.run.trackers import Trackers
from pipeline.batch import Batch
from pipeline.data_wait import DataWait
from shards.redact import printable

# Kinds of the lines about evaluations, and what people call what they are of.
EVALUATIONS: dict[Scored, str] = {"weights": "eval", "average": "eval-ema"}
SCORED_NAMES: dict[Scored, str] = {"weights": "weights", "average": "moving average"}


class Metrics:
    """A run's running account: intervals of steps, evaluations, the clock; to the log and the terminal.

    A context manager; closing it ends the display.
    """

    def __init__(
        self, recipe: Recipe, feed: Feed, engine: Engine, progress: Progress, trackers: Trackers | None = None
    ) -> None:
        self._world, self._plan, self._begun_at = engine.world, feed.plan, progress
        main = self._world.is_main
        self._log = MetricsLog(recipe.run.out if main else None, trackers)
        self._display = Display(enabled=main, total_steps=feed.last_step, done=progress.step)
        self._roofline = Roofline.of(feed, engine) if main else None
        self._write("start", step=progress.step, world=self._world.size, engine=engine.description)
        self._clock = time.perf_counter()
        self._rate, self._wait = 0.0, DataWait(self._world.device)
        self._last: dict[Scored, float] = {}  # top-1 of the last evaluation
        self.restart_interval()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        self.say(*self._log.close())
        self._display.close()

    def _write(self, kind: str, **values: Any) -> None:
        self._log.write(kind, **values)
        self.say(*self._log.messages())

    def restart_interval(self) -> None:
        """Begin a new interval, so that evaluating and saving do not count as training."""
        self._interval_started = time.perf_counter()
        self._wait.restart()
        self._results: list[StepResult] = []

    def take(self, loader: Iterator[Batch], count: int) -> list[Batch]:
        """Return the batches of the next step, and account for the time that the device waits for them."""
        return self._wait.next_batches(loader, count)

    def say(self, *lines: str) -> None:
        for line in lines:
            self._display.say(line)

    def step(self, step: int, rate: float, result: StepResult) -> None:
        """Account for optimiser step `step`, whose work has been handed over; nothing is read from the device."""
        self._wait.mark_step_end()
        self._step, self._rate = step, rate
        self._results.append(result)
        self._display.step(step + 1)

    def interval(self, *, skipped: int, replaced: int) -> None:
        """Write a line about the steps since the last one. Reads the device; collective.

        Args:
            skipped: updates skipped so far.
            replaced: damaged samples that this rank has replaced so far.
        """
        if not self._results:
            return
        losses = torch.stack([result.loss for result in self._results])
        finite = losses.isfinite()
        sums = torch.stack([torch.where(finite, losses, 0.0).sum(), finite.sum(), losses.new_tensor(replaced)]).float()
        if self._world.size > 1:
            dist.all_reduce(sums)
        norms = torch.stack([result.grad_norm for result in self._results]).tolist()
        norms = [norm for norm in norms if math.isfinite(norm)]
        loss, count, replaced_by_all = sums.tolist()
        seconds = time.perf_counter() - self._interval_started
        rate = len(self._results) * self._plan.global_batch / seconds
        device = self._world.device
        values = {
            "loss": round(loss / count, 5) if count else None,
            "grad_norm": round(sum(norms) / len(norms), 4) if norms else None,
            "images_per_second": round(rate, 1),
            **self._utilization(rate / self._world.size),
            "data_wait": round(self._wait.seconds() / seconds, 4),
            # Reserved, not allocated: what CUDA graphs compute in counts as free between captures.
            "memory_bytes": torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0,
            "skipped": skipped,
            "replaced": int(replaced_by_all),
        }
        epoch = self._plan.at(self._step).epoch
        self._write("train", step=self._step + 1, epoch=epoch, lr=self._rate, **values)
        self._display.interval(self._step + 1, epoch, self._rate, values)
        self.restart_interval()

    def _utilization(self, rate: float) -> dict[str, float]:
        """What `rate` images per second use of each device, where rank 0 logs it."""
        if self._roofline is None:
            return {}
        return {"mfu": round(self._roofline.mfu(rate), 4), "bandwidth": round(self._roofline.bandwidth(rate), 4)}

    def begin(self, *messages: str, resolved: dict[str, str]) -> None:
        """Log how the run starts, and the values to which engine and loader have resolved open options."""
        self._write("resolved", step=self._begun_at.step, **resolved)
        self.say(*messages, "; ".join(f"{name}: {value}" for name, value in resolved.items()))

    def evaluation(self, step: int, results: Mapping[Scored, dict[str, float]]) -> dict[Scored, float]:
        """Write a line about each evaluation; returns top-1 of the weights and, if evaluated, of their average."""
        epoch = self._plan.at(step).epoch
        for scored, result in results.items():
            self._write(EVALUATIONS[scored], step=step, epoch=epoch, **result)
            self.say(
                f"epoch {epoch}{f', {SCORED_NAMES[scored]}' if len(results) > 1 else ''}: top-1 {result['top1']:.2%}, "
                f"top-5 {result['top5']:.2%}, loss {result['loss']:.4f} over {result['samples']} images"
            )
        self._last = {scored: result["top1"] for scored, result in results.items()}
        return self._last

    @property
    def seconds(self) -> float:
        """Seconds of training so far, over all starts of the run."""
        return self._begun_at.seconds + time.perf_counter() - self._clock

    def finish(self, progress: Progress) -> None:
        """Write the last line, and say how the run ended: the best accuracy and the last ones."""
        best = {"best": progress.best, "best_of": progress.best_of} if progress.best_of else {"best": None}
        self._write("end", step=progress.step, seconds=round(progress.seconds, 1), **best)
        text = f"{progress.step} steps in {progress.seconds:.0f} s"
        if progress.best_of:
            text += f", best top-1 {progress.best:.2%}"
            text += f" ({SCORED_NAMES[progress.best_of]})" if "average" in self._last else ""
        if len(self._last) > 1:
            text += "; at the end: " + ", ".join(
                f"{SCORED_NAMES[name]} {top1:.2%}" for name, top1 in self._last.items()
            )
        self.say(text)


class Display:
    """Progress on a terminal as a bar, elsewhere as a line per interval; silent on ranks other than 0."""

    def __init__(self, *, enabled: bool, total_steps: int, done: int) -> None:
        self._enabled = enabled
        self._total = total_steps
        self.console = Console(file=sys.stderr, quiet=not enabled, highlight=False)
        self._bar: Bar | None = None
        if enabled and self.console.is_terminal:
            self._bar = Bar(
                TextColumn("[bold]train"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}", markup=False),
                console=self.console,
            )
            self._task = self._bar.add_task("", total=total_steps, completed=done)
            self._bar.start()

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(printable(text), markup=False, soft_wrap=True)

    def step(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def interval(self, step: int, epoch: int, lr: float, values: dict[str, Any]) -> None:
        loss, norm = (float("nan") if values[name] is None else values[name] for name in ("loss", "grad_norm"))
        text = (
            f"epoch {epoch} loss {loss:.3f} lr {lr:.2e} norm {norm:.2f} "
            f"{values['images_per_second']:.0f} img/s, MFU {values.get('mfu', 0):.1%}, "
            f"waiting for data {values['data_wait']:.1%}"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        else:
            self.say(f"step {step}/{self._total} {text}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

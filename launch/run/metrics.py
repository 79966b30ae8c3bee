"""Collect the metrics of a run and write them to RUN/metrics.jsonl, to the trackers and to the terminal.

Losses and gradient norms stay on the device until a log line is due, so that steps do not wait for the device.
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
from launch.run.progress import Progress, WeightsKind
from launch.run.trackers import Trackers
from pipeline.batch import Batch
from pipeline.data_wait import DataWait
from shards.redact import printable

# For each kind of weights: the `kind` of its evaluation lines in the metrics, and its name in messages.
EVALUATION_KINDS: dict[WeightsKind, str] = {"weights": "eval", "average": "eval-ema"}
WEIGHTS_NAMES: dict[WeightsKind, str] = {"weights": "weights", "average": "moving average"}


class Metrics:
    """Collects and logs the metrics of training intervals and evaluations, and measures the time of training.

    It is a context manager, which closes the log and the progress bar on exit.
    """

    def __init__(
        self, recipe: Recipe, feed: Feed, engine: Engine, progress: Progress, trackers: Trackers | None = None
    ) -> None:
        self._world, self._plan, self._resumed = engine.world, feed.plan, progress
        main = self._world.is_main
        self._log = MetricsLog(recipe.run.out if main else None, trackers)
        self._display = Display(enabled=main, total_steps=feed.last_step, done=progress.step)
        self._roofline = Roofline.of(feed, engine) if main else None
        self._write("start", step=progress.step, world=self._world.size, engine=engine.description)
        self._clock = time.perf_counter()
        self._rate, self._wait = 0.0, DataWait(self._world.device)
        self._last: dict[WeightsKind, float] = {}  # top-1 accuracies of the last evaluation
        self.restart_interval()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        self.print(*self._log.close())
        self._display.close()

    def _write(self, kind: str, **values: Any) -> None:
        self._log.write(kind, **values)
        self.print(*self._log.messages())

    def restart_interval(self) -> None:
        """Start a new interval, so that the throughput does not include evaluation and saving."""
        self._interval_started = time.perf_counter()
        self._wait.restart()
        self._results: list[StepResult] = []

    def next_batches(self, loader: Iterator[Batch], count: int) -> list[Batch]:
        """Return the batches of the next step, and measure how long the device waits for them."""
        return self._wait.next_batches(loader, count)

    def print(self, *lines: str) -> None:
        for line in lines:
            self._display.print(line)

    def add_step(self, step: int, rate: float, result: StepResult) -> None:
        """Add optimizer step `step`, whose kernels have been launched. Does not wait for the device.

        Args:
            rate: learning rate of the step.
        """
        self._wait.mark_step_end()
        self._step, self._rate = step, rate
        self._results.append(result)
        self._display.update(step + 1)

    def log_interval(self, *, skipped: int, replaced: int) -> None:
        """Write a line about the steps since the last interval. Collective; waits for the device.

        Args:
            skipped: number of updates skipped so far.
            replaced: number of damaged samples that this rank has replaced so far.
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
            # Reserved, not allocated memory: the pool of CUDA graphs does not count as allocated between captures.
            "memory_bytes": torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0,
            "skipped": skipped,
            "replaced": int(replaced_by_all),
        }
        epoch = self._plan.at(self._step).epoch
        self._write("train", step=self._step + 1, epoch=epoch, lr=self._rate, **values)
        self._display.show_interval(self._step + 1, epoch, self._rate, values)
        self.restart_interval()

    def _utilization(self, rate: float) -> dict[str, float]:
        """Return the utilization of a device at `rate` images per second, on rank 0."""
        if self._roofline is None:
            return {}
        return {"mfu": round(self._roofline.mfu(rate), 4), "bandwidth": round(self._roofline.bandwidth(rate), 4)}

    def log_start(self, *messages: str, resolved: dict[str, str]) -> None:
        """Log messages of the start, and the values of options that were not set.

        Args:
            resolved: the values of these options, by name.
        """
        self._write("resolved", step=self._resumed.step, **resolved)
        self.print(*messages, "; ".join(f"{name}: {value}" for name, value in resolved.items()))

    def log_evaluation(self, step: int, results: Mapping[WeightsKind, dict[str, float]]) -> dict[WeightsKind, float]:
        """Write a line about each evaluation; return the top-1 accuracies."""
        epoch = self._plan.at(step).epoch
        for weights, result in results.items():
            self._write(EVALUATION_KINDS[weights], step=step, epoch=epoch, **result)
            name = f", {WEIGHTS_NAMES[weights]}" if len(results) > 1 else ""
            self.print(
                f"epoch {epoch}{name}: top-1 {result['top1']:.2%}, top-5 {result['top5']:.2%}, "
                f"loss {result['loss']:.4f} over {result['samples']} images"
            )
        self._last = {weights: result["top1"] for weights, result in results.items()}
        return self._last

    @property
    def seconds(self) -> float:
        """Seconds of training so far, in all starts of the run."""
        return self._resumed.seconds + time.perf_counter() - self._clock

    def finish(self, progress: Progress) -> None:
        """Write the last line of the metrics, and print the best and the last accuracies."""
        best = {"best": progress.best, "best_of": progress.best_of} if progress.best_of else {"best": None}
        self._write("end", step=progress.step, seconds=round(progress.seconds, 1), **best)
        text = f"{progress.step} steps in {progress.seconds:.0f} s"
        if progress.best_of:
            text += f", best top-1 {progress.best:.2%}"
            text += f" ({WEIGHTS_NAMES[progress.best_of]})" if "average" in self._last else ""
        if len(self._last) > 1:
            text += "; at the end: " + ", ".join(
                f"{WEIGHTS_NAMES[weights]} {top1:.2%}" for weights, top1 in self._last.items()
            )
        self.print(text)


class Display:
    """Shows progress on stderr of rank 0: a progress bar on a terminal, otherwise a line per interval."""

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

    def print(self, text: str) -> None:
        """Print a line (above the progress bar)."""
        self.console.print(printable(text), markup=False, soft_wrap=True)

    def update(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def show_interval(self, step: int, epoch: int, lr: float, values: dict[str, Any]) -> None:
        loss, norm = (float("nan") if values[name] is None else values[name] for name in ("loss", "grad_norm"))
        text = (
            f"epoch {epoch} loss {loss:.3f} lr {lr:.2e} norm {norm:.2f} "
            f"{values['images_per_second']:.0f} img/s, MFU {values.get('mfu', 0):.1%}, "
            f"waiting for data {values['data_wait']:.1%}"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        else:
            self.print(f"step {step}/{self._total} {text}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

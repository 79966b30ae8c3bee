"""Metrics: RUN/metrics.jsonl is the truth, the terminal is a view of it.

Losses and norms stay on the device until a line is due, so that no step waits for the log.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

import fat
from launch.checkpoint import Progress
from launch.engine import Engine, StepResult
from launch.feed import Feed
from launch.limits import Limits, limits_of
from launch.recipe import Recipe
from launch.trackers import open_trackers

METRICS_NAME = "metrics.jsonl"


class Tracker:
    """A run's running account: intervals of steps, evaluations, the clock; to the log and the terminal.

    A context manager; closing it ends the display.
    """

    def __init__(self, recipe: Recipe, feed: Feed, engine: Engine, progress: Progress) -> None:
        self._world, self._plan, self._begun_at = engine.world, feed.plan, progress
        main = self._world.is_main
        self._log = MetricsLog(recipe, recipe.run.out if main else None)
        self._display = Display(enabled=main, total_steps=feed.last_step, done=progress.step)
        self._yardstick = Yardstick.of(recipe, feed, engine) if main else None
        self._log.write("start", step=progress.step, world=self._world.size, engine=engine.description)
        self._clock = time.perf_counter()
        self._rate = 0.0
        self.restart_interval()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        self._display.close()
        self._log.close()

    def restart_interval(self) -> None:
        """Begin a new interval, so that evaluating and saving do not count as training."""
        self._interval_started = time.perf_counter()
        self._waited = 0.0
        self._results: list[StepResult] = []

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Time spent in here is time that the device may have waited for its data."""
        asked = time.perf_counter()
        yield
        self._waited += time.perf_counter() - asked

    def say(self, *lines: str) -> None:
        for line in lines:
            self._display.say(line)

    def step(self, step: int, rate: float, result: StepResult) -> None:
        """Account for optimiser step `step`; nothing is read from the device."""
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
            **(self._yardstick.shares(rate) if self._yardstick else {}),
            "data_wait": round(self._waited / seconds, 4),
            # Reserved, not allocated: what CUDA graphs compute in counts as free between captures.
            "memory_bytes": torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0,
            "skipped": skipped,
            "replaced": int(replaced_by_all),
        }
        epoch = self._plan.at(self._step).epoch
        self._log.write("train", step=self._step + 1, epoch=epoch, lr=self._rate, **values)
        self._display.interval(self._step + 1, epoch, self._rate, values)
        self.restart_interval()

    def begin(self, *lines: str, picks: dict[str, str]) -> None:
        """Say how the run starts; write down and say what engine and loader have chosen for themselves."""
        self._log.write("picks", step=self._begun_at.step, **picks)
        self.say(*lines, "; ".join(f"{name}: {choice}" for name, choice in picks.items()))

    def evaluation(self, step: int, result: dict[str, float], *, kind: str = "eval") -> float:
        """Write a line about an evaluation; returns its top-1."""
        epoch = self._plan.at(step).epoch
        self._log.write(kind, step=step, epoch=epoch, **result)
        self.say(
            f"epoch {epoch}{', moving average' if kind == 'eval-ema' else ''}: top-1 {result['top1']:.2%}, "
            f"top-5 {result['top5']:.2%}, loss {result['loss']:.4f} over {result['samples']} images"
        )
        return result["top1"]

    def progress(self, before: Progress, step: int, top1: float | None = None, *, pending: bool = False) -> Progress:
        """Where the run stands with `step` optimiser steps behind it, the last evaluated to `top1` (or still to be)."""
        position = self._plan.at(step)
        is_best = top1 is not None and top1 > before.best
        return Progress(
            step=step,
            epoch=position.epoch,
            epoch_step=position.step,
            best=top1 if is_best and top1 is not None else before.best,
            is_best=is_best,
            pending_evaluation=pending,
            seconds=self._begun_at.seconds + time.perf_counter() - self._clock,
        )

    def finish(self, progress: Progress) -> None:
        self._log.write("end", step=progress.step, seconds=round(progress.seconds, 1), best=progress.best)
        best = f", best top-1 {progress.best:.2%}" if progress.best else ""
        self.say(f"{progress.step} steps in {progress.seconds:.0f} s{best}")


@dataclass(frozen=True)
class Yardstick:
    """What the run's speed is compared with."""

    flops: int
    """Floating-point operations of an image, forward and backward."""
    passed: int
    """Bytes that an image must pass through memory in perfectly fused blocks."""
    limits: Limits
    """Of one device."""
    devices: int

    @classmethod
    def of(cls, recipe: Recipe, feed: Feed, engine: Engine) -> Yardstick:
        """Counts the recipe's model and measures this rank's device: some tenths of a second."""
        with torch.device("meta"):
            cost = fat.count(
                fat.create_model(f"fat_{recipe.model.variant}", num_classes=feed.classes), recipe.data.size
            )
        return cls(
            flops=cost.training_flops,
            passed=cost.fused_bytes(engine.input_dtype.itemsize),
            limits=limits_of(engine.world.device, engine.precision),
            devices=engine.world.size,
        )

    def shares(self, rate: float) -> dict[str, float]:
        """Model FLOP utilisation, and the share of the copy bandwidth that fused blocks would need; of `rate` images/s
        over all devices."""
        each = rate / self.devices
        return {
            "mfu": round(each * self.flops / self.limits.arithmetic, 4),
            "bandwidth": round(each * self.passed / self.limits.bandwidth, 4),
        }


class MetricsLog:
    """Append-only JSON lines; on rank 0 only (elsewhere `folder` is None and nothing is written)."""

    def __init__(self, recipe: Recipe, folder: Path | None) -> None:
        self._file = (folder / METRICS_NAME).open("a", encoding="utf-8", buffering=1) if folder else None
        self._trackers = open_trackers(recipe, folder) if folder else []

    def write(self, kind: str, **values: Any) -> None:
        """One line: its kind ("start", "train", "eval", "end"), the Unix time, and the values."""
        if self._file is not None:
            self._file.write(json.dumps({"kind": kind, "time": round(time.time(), 3), **values}) + "\n")
        numbers = {f"{kind}/{name}": value for name, value in values.items() if isinstance(value, int | float)}
        for tracker in self._trackers:
            tracker.log(numbers, step=values.get("step", 0))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        for tracker in self._trackers:
            tracker.finish()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All lines of a run. Where a resumed run repeated steps, a step's later line wins; torn lines are left out."""
    lines: dict[tuple[str, int], dict[str, Any]] = {}
    for number, text in enumerate((folder / METRICS_NAME).read_text(encoding="utf-8").splitlines()):
        try:
            line = json.loads(text)
        except ValueError:
            continue
        key = (line["kind"], line.get("step", -number))
        lines.pop(key, None)
        lines[key] = line
    return list(lines.values())


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
                TextColumn("{task.description}"),
                console=self.console,
            )
            self._task = self._bar.add_task("", total=total_steps, completed=done)
            self._bar.start()

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, markup=False, soft_wrap=True)

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

"""Metrics: RUN/metrics.jsonl is the truth, the terminal is a view of it.

Losses and norms stay on the device until a line is due, so that no step waits for one.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from launch.checkpoint import Progress
from launch.engine import StepResult
from launch.world import World
from pipeline.plan import Position

METRICS_NAME = "metrics.jsonl"


class Tracker:
    """A run's running account: intervals of steps, evaluations, the clock; to the log and the terminal.

    Args:
        folder: where rank 0 writes metrics.jsonl.
        progress: where the run stood when it began.
        total_steps: optimiser steps of the whole run.
        images: rows of a global batch.
    """

    def __init__(self, folder: Path, world: World, *, progress: Progress, total_steps: int, images: int) -> None:
        self._world, self._images, self._begun_at = world, images, progress
        self._log = MetricsLog(folder if world.is_main else None)
        self._display = Display(enabled=world.is_main, total_steps=total_steps, done=progress.step)
        self._clock = time.perf_counter()
        self._last: tuple[int, int, float] = (0, 0, 0.0)
        self.resume_clock()

    def resume_clock(self) -> None:
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

    def say(self, line: str) -> None:
        self._display.say(line)

    def start(self, engine: str) -> None:
        self._log.write("start", step=self._begun_at.step, world=self._world.size, engine=engine)

    def step(self, step: int, epoch: int, lr: float, result: StepResult) -> None:
        """Account for optimiser step `step`; nothing is read from the device."""
        self._last = (step + 1, epoch, lr)
        self._results.append(result)
        self._display.step(step + 1)

    def interval(self) -> None:
        """Write a line about the steps since the last one. Reads the device, so it waits for the last step."""
        step, epoch, lr = self._last
        device = self._world.device
        loss = torch.stack([result.loss for result in self._results]).mean()
        if self._world.size > 1:
            dist.all_reduce(loss)
        norm = torch.stack([result.grad_norm for result in self._results]).mean()
        values = {"loss": round(loss.item() / self._world.size, 5), "grad_norm": round(norm.item(), 4)}
        seconds = time.perf_counter() - self._interval_started
        values["images_per_second"] = round(len(self._results) * self._images / seconds, 1)
        values["data_wait"] = round(self._waited / seconds, 4)
        values["memory_bytes"] = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        self._log.write("train", step=step, epoch=epoch, lr=lr, **values)
        self._display.interval(step, epoch, lr, values)
        self.resume_clock()

    def evaluation(self, step: int, epoch: int, result: dict[str, float]) -> None:
        self._log.write("eval", step=step, epoch=epoch, **result)
        self.say(
            f"epoch {epoch}: top-1 {result['top1']:.2%}, top-5 {result['top5']:.2%}, loss {result['loss']:.4f} "
            f"over {result['samples']} images"
        )

    def progress(self, before: Progress, step: int, position: Position, top1: float | None) -> Progress:
        """Where the run stands after optimiser step `step`, evaluated to `top1`."""
        seconds = self._begun_at.seconds + time.perf_counter() - self._clock
        is_best = top1 is not None and top1 > before.best
        best = top1 if is_best and top1 is not None else before.best
        return Progress(
            step=step, epoch=position.epoch, epoch_step=position.step, best=best, is_best=is_best, seconds=seconds
        )

    def finish(self, progress: Progress) -> None:
        self._log.write("end", step=progress.step, seconds=round(progress.seconds, 1), best=progress.best)
        self.say(f"{progress.step} steps in {progress.seconds:.0f} s, best top-1 {progress.best:.2%}")

    def close(self) -> None:
        self._display.close()
        self._log.close()


class MetricsLog:
    """Append-only JSON lines; on rank 0 only (elsewhere `folder` is None and nothing is written)."""

    def __init__(self, folder: Path | None) -> None:
        self._file = (folder / METRICS_NAME).open("a", encoding="utf-8", buffering=1) if folder else None

    def write(self, kind: str, **values: Any) -> None:
        """One line: its kind ("start", "train", "eval", "end"), the Unix time, and the values."""
        if self._file is not None:
            self._file.write(json.dumps({"kind": kind, "time": round(time.time(), 3), **values}) + "\n")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


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

    def interval(self, step: int, epoch: int, lr: float, values: dict[str, float]) -> None:
        text = (
            f"epoch {epoch} loss {values['loss']:.3f} lr {lr:.2e} norm {values['grad_norm']:.2f} "
            f"{values['images_per_second']:.0f} img/s, waiting for data {values['data_wait']:.1%}"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        else:
            self.say(f"step {step}/{self._total} {text}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

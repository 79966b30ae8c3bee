"""Results of a race: one per seed, from the metrics of its run, and their median."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from launch.monitor.time_to_accuracy import time_to_accuracy
from launch.run.metrics_file import read_run
from shards.errors import storage_error
from shards.files.durable import durable_write
from shards.progress import duration


@dataclass(frozen=True)
class SeedResult:
    """Result of the run with one seed."""

    seed: int
    seconds: float | None
    """Seconds of training until the target was reached, over all starts; None: it was not reached."""
    wall_seconds: float | None
    """Seconds from the first start of the clock until then, including the time between starts and repeated steps."""
    top1: float
    """Top-1 accuracy that reached the target, else the best one."""
    epoch: int
    """Epoch of this evaluation, counted from 1."""
    step: int
    """Optimizer steps before this evaluation."""
    starts: int
    """How often the run was started."""
    device: str
    """Device of rank 0."""
    world: int
    """Number of ranks of the last start."""

    @property
    def reached(self) -> bool:
        return self.seconds is not None


def read_result(run: Path, seed: int, target: float) -> SeedResult:
    """Return the result of a run from its metrics.

    Raises:
        UserError: the metrics cannot be read.
    """
    lines = read_run(run)
    starts = [line for line in lines if line["kind"] == "start"]
    found = time_to_accuracy(lines, target)
    assert found is not None  # because there is a target
    begin = next(line["time"] for line in lines if line["kind"] == "run_start")
    end = next((line["time"] for line in lines if line["kind"] == "eval" and line.get("clock") == found.seconds), None)
    return SeedResult(
        seed=seed,
        seconds=found.seconds,
        wall_seconds=None if end is None else round(end - begin, 3),
        top1=found.top1,
        epoch=found.epoch,
        step=found.step,
        starts=len(starts),
        device=starts[-1]["device"],
        world=starts[-1]["world"],
    )


def median_seconds(results: Sequence[SeedResult]) -> float | None:
    """Return the median time to accuracy, for which a run that did not reach it counts as infinitely long.

    None: the median is infinite.
    """
    found = median(math.inf if result.seconds is None else result.seconds for result in results)
    return found if found < math.inf else None


def table(results: Sequence[SeedResult], target: float) -> list[str]:
    """Return the lines of a table of all seeds, and the median."""
    rows = [("seed", "reached", "epoch", "step", "seconds", "top-1")]
    for result in results:
        seconds = "-" if result.seconds is None else f"{result.seconds:,.1f}"
        reached = "yes" if result.reached else "no"
        rows.append((str(result.seed), reached, str(result.epoch), f"{result.step:,}", seconds, f"{result.top1:.2%}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    found = median_seconds(results)
    time = "not reached" if found is None else f"{found:,.1f} s ({duration(found)})"
    count = f"{len(results)} seed{'s' if len(results) > 1 else ''}"
    return [
        *("  ".join(map(str.rjust, row, widths)) for row in rows),
        f"time to {target:.2%}, median of {count}: {time}",
    ]


def write_results(path: Path, description: Mapping[str, Any], results: Sequence[SeedResult]) -> None:
    """Write a JSON file with the description of the race, all results and their median.

    Raises:
        StorageFailed: the file cannot be written.
    """
    content = {**description, "median_seconds": median_seconds(results), "results": list(map(asdict, results))}
    try:
        durable_write(path, (json.dumps(content, indent=1) + "\n").encode())
    except OSError as error:
        raise storage_error(path, error, "the results are printed") from error

"""Time to accuracy: seconds of training until the first evaluation that reaches the target, from the metrics.

What is timed follows MLPerf Training: from before the first access to training data, after initialization and
compilation, to the end of the evaluation. The clock is saved in checkpoints, so it includes all starts of a run, but
neither the time between starts nor steps that a start repeats after a crash.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from launch.run.metrics_file import final_timeline
from launch.run.metrics_schema import EVALUATIONS
from shards.progress import duration


@dataclass(frozen=True)
class TimeToAccuracy:
    """How far a run has come toward a target accuracy."""

    target: float
    """Top-1 accuracy to reach, as a fraction."""
    top1: float
    """Top-1 accuracy of the evaluation that reached the target, else the best one so far."""
    epoch: int
    """Epoch of this evaluation, counted from 1; 0: nothing was evaluated."""
    step: int
    """Optimizer steps done before this evaluation."""
    seconds: float | None
    """Seconds of training until the target was reached; None: it was not reached."""

    @property
    def reached(self) -> bool:
        return self.seconds is not None

    def describe(self) -> str:
        """Return a phrase such as "98.50% in 0:03:02, epoch 9"."""
        if self.seconds is None:
            return f"{self.target:.2%} not reached, best {self.top1:.2%}"
        return f"{self.target:.2%} in {duration(self.seconds)}, epoch {self.epoch}"


def time_to_accuracy(lines: Sequence[dict[str, Any]], target: float | None = None) -> TimeToAccuracy | None:
    """Return the time to accuracy of a run.

    Args:
        lines: all lines of its metrics, in the order of the file.
        target: top-1 accuracy. None: the --target-top1 of the last start.

    Returns:
        None: there is no target.
    """
    if target is None:
        target = next((line.get("target_top1") for line in reversed(lines) if line["kind"] == "run_start"), None)
    if target is None:
        return None
    best = TimeToAccuracy(target, top1=0.0, epoch=0, step=0, seconds=None)
    for line in final_timeline(lines):
        if line["kind"] in EVALUATIONS and line["top1"] > best.top1:
            place = {"top1": line["top1"], "epoch": line["epoch"], "step": line["step"]}
            if line["top1"] >= target:
                return TimeToAccuracy(target, **place, seconds=line.get("clock"))
            best = TimeToAccuracy(target, **place, seconds=None)
    return best

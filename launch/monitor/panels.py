"""The curves of one or several runs: which panels there are, and the points of each curve from RUN/metrics.jsonl."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from launch.run.metrics_file import final_timeline
from launch.run.progress import WeightsKind
from shards.redact import printable

Axis = Literal["steps", "epochs", "time"]
Lines = Sequence[dict[str, Any]]
Points = tuple[NDArray[np.float64], NDArray[np.float64]]

MAX_POINTS = 1000  # of a curve: more than a chart has pixels
MEANS = 100  # points of the mean of a long curve
_UNITS = (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))
_ALL_CORRECT = 1.0


@dataclass(frozen=True)
class Series:
    """A quantity of metrics lines that is plotted as a curve."""

    name: str
    kind: str
    """Kind of the lines."""
    field: str
    scale: float = 1.0


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    series: tuple[Series, ...]
    logarithmic: bool = False
    from_zero: bool = False
    """Whether the vertical axis begins at 0."""
    gpu: bool = False
    """Whether the quantity only means something on GPUs."""

    @property
    def heading(self) -> str:
        return f"{self.title} ({self.unit})" if self.unit else self.title


def _accuracies(metric: str) -> tuple[Series, ...]:
    return Series("weights", "eval", metric, 100), Series("moving average (EMA)", "eval-ema", metric, 100)


def _training(title: str, unit: str, metric: str, scale: float = 1.0, *, gpu: bool = False) -> Panel:
    return Panel(title, unit, (Series("training", "train", metric, scale),), from_zero=True, gpu=gpu)


TOP1, TOP5 = "Top-1 accuracy", "Top-5 accuracy"
PANELS = (
    Panel(
        "Loss",
        "",
        (
            Series("training", "train", "loss"),
            Series("validation, weights", "eval", "loss"),
            Series("validation, moving average (EMA)", "eval-ema", "loss"),
        ),
        logarithmic=True,
    ),
    Panel(TOP1, "%", _accuracies("top1")),
    Panel(TOP5, "%", _accuracies("top5")),
    _training("Learning rate", "", "lr"),
    _training("Gradient norm before clipping", "", "grad_norm"),
    _training("Throughput", "images/s", "images_per_second"),
    _training("Waiting for data", "% of the time", "data_wait", 100),
    Panel(
        "Computation and communication of rank 0",
        "% of the time",
        (
            Series("computation", "train", "compute", 100),
            Series("communication", "train", "communication", 100),
        ),
        from_zero=True,
    ),
    _training("Delay of the slowest rank", "% more work than the median", "behind", 100),
    _training("GPU memory of rank 0", "GiB", "memory_bytes", 2.0**-30, gpu=True),
    _training("Model FLOPs utilization", "%", "mfu", 100, gpu=True),
)


class Timeline:
    """The lines of one run, in wall-clock order and as the run finally went, without work that was repeated later."""

    def __init__(self, name: str, lines: Lines) -> None:
        self.name = printable(name)
        self.lines = lines
        self.final: Lines = final_timeline(lines)
        kept = {id(line) for line in self.final}
        self.lost = [line for line in lines if line["kind"] == "start" or id(line) not in kept]
        self.starts = [line for line in lines if line["kind"] == "start"]
        times = [float(line["started"] if "started" in line else line["time"]) for line in lines]
        self.began = min(times, default=0.0)  # not that of the first line: a clock may be set back

    @property
    def seconds(self) -> float:
        """Wall-clock time from the first start to the last line."""
        return max((line["time"] for line in self.lines), default=0.0) - self.began

    def best(self) -> tuple[float, WeightsKind] | None:
        """Return the best top-1 accuracy, and which weights reached it first; None: nothing was evaluated."""
        found: tuple[float, WeightsKind] | None = None
        for line in self.final:
            if line["kind"] in ("eval", "eval-ema") and (found is None or line["top1"] > found[0]):
                found = line["top1"], "weights" if line["kind"] == "eval" else "average"
        return found

    def points(self, series: Series, axis: Axis, unit: float = 1.0, *, lost: bool = False) -> Points:
        """Return a curve's points; a point that is not a number interrupts the curve.

        Args:
            unit: seconds per unit of the time axis.
            lost: the work that was lost in a crash and repeated, instead of the rest.
        """
        found = list(self._points(series, axis, unit, lost=lost))
        values = np.array(found, dtype=np.float64).reshape(-1, 2)
        return values[:, 0], values[:, 1]

    def _points(self, series: Series, axis: Axis, unit: float, *, lost: bool) -> Iterator[tuple[float, float]]:
        place = 0.0
        for line in self.lost if lost else self.final:
            if line["kind"] == "start" and (lost or (axis == "time" and series.kind == "train")):
                yield place, np.nan
            elif line["kind"] == series.kind:
                place = self.place(line, axis, unit)
                value = line.get(series.field)
                yield place, np.nan if value is None else value * series.scale

    def place(self, line: dict[str, Any], axis: Axis, unit: float) -> float:
        """Return the position of a line on a horizontal axis."""
        if axis == "time":
            return float(line["time"] - self.began) / unit
        if axis == "epochs":
            return float(line["step"] / max(1, self.starts[-1]["steps_per_epoch"])) if self.starts else 0.0
        return float(line["step"])

    def interruptions(self, axis: Axis, unit: float) -> list[float]:
        """Return where the run was started again."""
        if axis == "time":
            return [float(line["started"] - self.began) / unit for line in self.starts[1:]]
        return [self.place(line, axis, unit) for line in self.starts[1:]]


def has_data(panel: Panel, runs: Sequence[Timeline]) -> bool:
    """Return whether a panel has something to show: a value other than 0, or an accuracy below 100 %."""
    trivial = _ALL_CORRECT if panel.title == TOP5 else 0.0
    if panel.gpu and not any(line.get("memory_bytes") for run in runs for line in run.lines):
        return False
    return any(
        line.get(series.field) not in (None, trivial)
        for run in runs
        for series in panel.series
        for line in run.lines
        if line["kind"] == series.kind
    )


def time_unit(runs: Sequence[Timeline]) -> tuple[str, float]:
    """Return the name of the unit of the time axis and its number of seconds."""
    longest = max((run.seconds for run in runs), default=0.0)
    return next((unit for unit in _UNITS if longest >= 2 * unit[1]), _UNITS[-1])


def downsampled(points: Points, limit: int = MAX_POINTS) -> Points:
    """Return the smallest and largest value of each of limit/2 equal parts of a longer curve, and its interruptions."""
    places, values = points
    if len(places) <= limit:
        return points
    keep = {0, len(places) - 1, *np.flatnonzero(np.isnan(values)).tolist()}
    for part in np.array_split(np.arange(len(places)), limit // 2):
        finite = part[~np.isnan(values[part])]
        if len(finite):
            keep |= {int(finite[values[finite].argmin()]), int(finite[values[finite].argmax()])}
    order = sorted(keep)
    return places[order], values[order]


def means(points: Points, count: int = MEANS) -> Points:
    """Return the mean place and value of each of `count` equal parts of a curve."""
    places, values = (column[np.isfinite(points[1])] for column in points)
    parts = [np.array_split(column, min(count, len(column))) for column in (places, values) if len(column)]
    if not parts:
        return points
    return np.array([part.mean() for part in parts[0]]), np.array([part.mean() for part in parts[1]])

"""Draw the curves of one or several runs with matplotlib."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from launch.monitor.metrics import WEIGHTS_NAMES
from launch.monitor.panels import (
    MAX_POINTS,
    MEANS,
    PANELS,
    TOP1,
    Axis,
    Panel,
    Points,
    Timeline,
    downsampled,
    has_data,
    means,
    time_unit,
)
from launch.run.metrics_file import read_run
from launch.run.progress import WeightsKind
from shards.files.output import check_output, write_output

FORMATS = (".png", ".pdf", ".svg")
# Okabe and Ito's colors, which color-blind people can tell apart; black replaces yellow, which is too light on white.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
DASHES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
MARKERS = {"eval": "o", "eval-ema": "^"}  # of the evaluations of the weights and of their EMA
_MAX_MARKERS = 40  # of a curve; with more, they would merge
_LOG_RANGE = 8.0  # smallest ratio of a panel's values for which a logarithmic axis has enough ticks
_PALE: dict[str, Any] = {"alpha": 0.35, "linestyle": "solid"}
_TICK_STEPS = (1, 2, 2.5, 5, 10)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Theme:
    """Colors of a drawing."""

    text: str = "#333333"
    grid: str = "#dddddd"
    lost: str = "#999999"
    curves: Sequence[str] = COLORS

    def settings(self) -> dict[str, Any]:
        """Return matplotlib's settings."""
        return {
            "axes.edgecolor": self.text,
            "axes.labelcolor": self.text,
            "axes.spines.right": False,
            "axes.spines.top": False,
            "grid.color": self.grid,
            "text.color": self.text,
            # Names of runs are no formulas.
            "text.parse_math": False,
            "xtick.color": self.text,
            "ytick.color": self.text,
        }


@dataclass(frozen=True)
class Curve:
    """Look of a curve. Colors and dashes distinguish runs, or the series of one run; markers distinguish series."""

    label: str
    color: int
    dash: int
    kind: str


def draw_curves(run: Path, out: Path | None = None, warn: Callable[[str], object] = log.warning) -> Path:
    """Plot the curves of `run`; return the path of the figure.

    Args:
        out: figure to write, .png, .pdf or .svg. None: RUN/curves.png.
        warn: called with a message if lines of the metrics are damaged; they are skipped.

    Raises:
        UserError: the metrics do not exist or cannot be read, or the figure cannot be written.
    """
    out = out or run / "curves.png"
    check_output(out, "--out", FORMATS)
    write_output(out, figure([Timeline(run.resolve().name, read_run(run, warn))], out.suffix[1:].lower()), "--out")
    return out


def figure(runs: Sequence[Timeline], suffix: str) -> bytes:
    """Return an image of all panels that have data, over the steps.

    Args:
        suffix: format of the image: png, pdf or svg.
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    panels = [panel for panel in PANELS if has_data(panel, runs)]
    theme = Theme()
    columns = min(3, max(1, len(panels)))
    rows = max(1, -(-len(panels) // columns))
    with matplotlib.rc_context(theme.settings()):
        drawing, grid = plt.subplots(
            rows, columns, figsize=(4.4 * columns, 3.4 * rows), constrained_layout=True, squeeze=False
        )
        for axes, panel in zip(grid.flat, panels, strict=False):
            draw_panel(axes, panel, runs, "steps", theme)
            axes.set_title(title(panel, runs), fontsize=10)
            if entries := legend(panel, runs):
                axes.legend(handles=[handle(entry, theme) for entry in entries], frameon=False, fontsize=8)
        for axes in grid.flat[len(panels) :]:
            axes.set_axis_off()
        if len(runs) > 1:
            drawing.legend(
                handles=[handle(entry, theme) for entry in run_legend(runs)], loc="outside lower center", ncols=3
            )
        image = io.BytesIO()
        drawing.savefig(image, format=suffix, dpi=110)
        plt.close(drawing)
    return image.getvalue()


def draw_panel(axes: Any, panel: Panel, runs: Sequence[Timeline], axis: Axis, theme: Theme) -> None:
    """Draw the curves of a panel, with an x label and without a title.

    Work that was lost in a crash is gray. Of a long curve of training, the mean is drawn over the curve.
    """
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

    unit_name, unit = time_unit(runs)
    limit = max(MAX_POINTS // len(runs), 4 * MEANS)
    values = []
    for number, run in enumerate(runs):
        for series, look in zip(panel.series, _looks(panel, runs, number), strict=True):
            lost, points = (run.points(series, axis, unit, lost=lost) for lost in (True, False))
            _plot(axes, downsampled(lost, limit), look, color=theme.lost, zorder=1.5, linewidth=1)
            long = look.kind == "train" and is_long(len(points[0]))
            color = theme.curves[look.color % len(theme.curves)]
            _plot(axes, downsampled(points, limit), look, color=color, **_PALE if long else {})
            if long:
                _plot(axes, means(points), look, color=color, linewidth=1.8)
            values.append(points[1])
        color = theme.curves[number % len(theme.curves)] if len(runs) > 1 else theme.text
        for place in run.interruptions(axis, unit):
            axes.axvline(place, color=color, linestyle=(0, (1, 3)), linewidth=0.8, zorder=1)
    positive = np.concatenate(values)
    positive = positive[positive > 0]
    if panel.logarithmic and len(positive) and positive.max() > _LOG_RANGE * positive.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=_TICK_STEPS))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.6g}"))
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=_TICK_STEPS, integer=axis == "steps"))
    if axis == "steps":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if panel.from_zero:
        axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.set_xlabel({"steps": "step", "epochs": "epoch", "time": unit_name}[axis])
    axes.grid(alpha=1, linewidth=0.6)
    axes.set_axisbelow(True)


def is_long(points: int) -> bool:
    """Return whether the mean of a curve is drawn over it."""
    return points > 4 * MEANS


def _plot(axes: Any, points: Points, look: Curve, **settings: Any) -> None:
    count = np.isfinite(points[1]).sum()
    if not count:
        return
    training = look.kind == "train"
    # The line of a single point would be invisible.
    marker = "o" if count == 1 else None if training or count > _MAX_MARKERS else MARKERS[look.kind]
    defaults: dict[str, Any] = {"linewidth": 1.1 if training else 1.6, "zorder": 2 if training else 3, "markersize": 4}
    defaults["linestyle"] = DASHES[look.dash % len(DASHES)]
    axes.plot(*points, marker=marker, **defaults | settings)


def _looks(panel: Panel, runs: Sequence[Timeline], number: int) -> list[Curve]:
    """Return the look of each series of run `number`."""
    several = len(runs) > 1
    return [
        Curve(series.name, number if several else place, number if several else 0, series.kind)
        for place, series in enumerate(panel.series)
    ]


def legend(panel: Panel, runs: Sequence[Timeline]) -> list[Curve]:
    """Return the entries of a panel's legend: its series, if it shows several. Of several runs, colors mean runs."""
    shown = [
        look
        for series, look in zip(panel.series, _looks(panel, runs, 0), strict=True)
        if any(line["kind"] == series.kind and series.field in line for run in runs for line in run.lines)
    ]
    if len(shown) < 2:
        return []
    return [Curve(look.label, -1, 0, look.kind) if len(runs) > 1 else look for look in shown]


def run_legend(runs: Sequence[Timeline]) -> list[Curve]:
    """Return the entries of the legend of several runs."""
    return [Curve(run.name, number, number, "train") for number, run in enumerate(runs)]


def handle(entry: Curve, theme: Theme) -> Any:
    """Return matplotlib's handle of a legend entry."""
    from matplotlib.lines import Line2D

    color = theme.text if entry.color < 0 else theme.curves[entry.color % len(theme.curves)]
    dash = DASHES[entry.dash % len(DASHES)]
    return Line2D([], [], color=color, linestyle=dash, marker=MARKERS.get(entry.kind), markersize=4, label=entry.label)


def title(panel: Panel, runs: Sequence[Timeline]) -> str:
    """Return a panel's title, with the best accuracy if there is one run."""
    if panel.title != TOP1 or len(runs) > 1 or (best := runs[0].best()) is None:
        return panel.heading
    return f"{panel.title}, best {best[0]:.2%}{best_name(runs[0], best)}"


def best_name(run: Timeline, best: tuple[float, WeightsKind]) -> str:
    """Return which weights reached the best accuracy, in parentheses, if the run has an EMA."""
    return f" ({WEIGHTS_NAMES[best[1]]})" if any(line["kind"] == "eval-ema" for line in run.lines) else ""

"""Plot loss, accuracy and learning rate of a run from its metrics."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from math import nan
from pathlib import Path
from typing import Any

from launch.monitor.metrics import EVALUATION_KINDS, WEIGHTS_NAMES
from launch.run.metrics_file import final_timeline, read_run
from launch.run.progress import WeightsKind
from shards.files.output import check_output, write_output

FORMATS = (".png", ".pdf", ".svg")

log = logging.getLogger(__name__)


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
    lines = final_timeline(read_run(run, warn))
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    train = [line for line in lines if line["kind"] == "train"]
    evals = {weights: [line for line in lines if line["kind"] == kind] for weights, kind in EVALUATION_KINDS.items()}
    evals = {weights: found for weights, found in evals.items() if found}
    panels = 3 if evals else 2  # a run without a validation split has no accuracies to plot
    figure, (loss, rate, *rest) = plt.subplots(1, panels, figsize=(13 * panels / 3, 3.6), constrained_layout=True)
    loss.plot(
        [t["step"] for t in train],
        [nan if t.get("loss") is None else t["loss"] for t in train],
        label="training",
        linewidth=1,
    )
    for weights, found in evals.items():
        name = f", {WEIGHTS_NAMES[weights]}" if len(evals) > 1 else ""
        loss.plot(*_column(found, "loss"), "o-", label=f"validation{name}", markersize=3)
    loss.set(title="loss", xlabel="step", yscale="log")
    loss.legend(frameon=False)
    rate.plot([t["step"] for t in train], [t["lr"] for t in train], linewidth=1)
    rate.set(title="learning rate", xlabel="step")
    if rest:
        _draw_accuracy(rest[0], evals)
    for axes in (loss, rate, *rest):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    image = io.BytesIO()
    figure.savefig(image, format=out.suffix[1:].lower(), dpi=110)
    plt.close(figure)
    write_output(out, image.getvalue(), "--out")
    return out


def _draw_accuracy(axes: Any, evals: dict[WeightsKind, list[dict[str, Any]]]) -> None:
    """Plot top-1 and top-5 accuracy of the weights and, if there is one, of their EMA; the title has the best top-1."""
    for weights, found in evals.items():
        name = f", {WEIGHTS_NAMES[weights]}" if len(evals) > 1 else ""
        for metric in ("top1", "top5"):
            steps, values = _column(found, metric)
            label = f"{metric[:3]}-{metric[3:]}{name}"
            axes.plot(steps, [100 * value for value in values], "o-", label=label, markersize=3)
    tops = {weights: max(line["top1"] for line in found) for weights, found in evals.items()}
    best = max(tops, key=lambda weights: tops[weights])  # if values are equal, max returns the first: the weights
    name = f" ({WEIGHTS_NAMES[best]})" if len(evals) > 1 else ""
    axes.set(title=f"validation accuracy, best {tops[best]:.2%}{name}", xlabel="step", ylabel="%")
    axes.legend(frameon=False)


def _column(lines: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Return the steps of metrics lines, and the value called `name` of each line."""
    return [line["step"] for line in lines], [line[name] for line in lines]

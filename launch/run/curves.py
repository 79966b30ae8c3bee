"""Draw loss, accuracy and learning rate of a run from its metrics."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from math import nan
from pathlib import Path
from typing import Any

from launch.run.metrics import EVALUATIONS, SCORED_NAMES
from launch.run.metrics_file import METRICS_NAME, read_metrics
from launch.run.progress import Scored
from shards.errors import UserError, storage_error
from shards.files.output import check_output, write_output

FORMATS = (".png", ".pdf", ".svg")

log = logging.getLogger(__name__)


def draw_curves(run: Path, out: Path | None = None, warn: Callable[[str], object] = log.warning) -> Path:
    """Write the curves of `run` as PNG.

    Args:
        warn: is told of damaged lines, which are left out.

    Raises:
        UserError: no metrics there, or they cannot be read, or the picture cannot be written.
    """
    out = out or run / "curves.png"
    check_output(out, "--out", FORMATS)
    try:
        lines = read_metrics(run, warn)
    except FileNotFoundError:
        raise UserError(
            f"{run}: no {METRICS_NAME}, so no run has written here; give the folder named by --out"
        ) from None
    except OSError as error:
        raise storage_error(run / METRICS_NAME, error, "give the folder named by --out") from error
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    train = [line for line in lines if line["kind"] == "train"]
    evals = {scored: [line for line in lines if line["kind"] == kind] for scored, kind in EVALUATIONS.items()}
    evals = {scored: found for scored, found in evals.items() if found}
    # A set without a validation split has no accuracies: no panel that looks as if they were all zero.
    panels = 3 if evals else 2
    figure, (loss, rate, *rest) = plt.subplots(1, panels, figsize=(13 * panels / 3, 3.6), constrained_layout=True)
    loss.plot(
        [t["step"] for t in train],
        [nan if t.get("loss") is None else t["loss"] for t in train],
        label="training",
        linewidth=1,
    )
    for scored, found in evals.items():
        name = f", {SCORED_NAMES[scored]}" if len(evals) > 1 else ""
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


def _draw_accuracy(axes: Any, evals: dict[Scored, list[dict[str, Any]]]) -> None:
    """Draw top-1 and top-5 of the weights and, where there is one, of their average; the title names the best."""
    for scored, found in evals.items():
        name = f", {SCORED_NAMES[scored]}" if len(evals) > 1 else ""
        for figure in ("top1", "top5"):
            steps, values = _column(found, figure)
            label = f"{figure[:3]}-{figure[3:]}{name}"
            axes.plot(steps, [100 * value for value in values], "o-", label=label, markersize=3)
    tops = {scored: max(line["top1"] for line in found) for scored, found in evals.items()}
    best = max(tops, key=lambda scored: tops[scored])  # of equal ones, the weights
    of = f" ({SCORED_NAMES[best]})" if len(evals) > 1 else ""
    axes.set(title=f"validation accuracy, best {tops[best]:.2%}{of}", xlabel="step", ylabel="%")
    axes.legend(frameon=False)


def _column(lines: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps, and the values of that name."""
    return [line["step"] for line in lines], [line[name] for line in lines]

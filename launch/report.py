"""Curves of a run, drawn from its metrics: `python -m launch.report RUN` writes RUN/curves.png."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from math import nan
from pathlib import Path

import tyro

from launch.metrics import METRICS_NAME, read_metrics
from shards.errors import UserError, report, storage_error
from shards.output import check_output, write_output
from shards.redact import printable, protect_output

FORMATS = (".png", ".pdf", ".svg")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """Draw loss, accuracy and learning rate of a run."""

    run: tyro.conf.Positional[Path]
    """Run folder."""
    out: Path | None = None
    """Picture to write. None = RUN/curves.png."""


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
    evals = [line for line in lines if line["kind"] == "eval"]
    figure, (loss, accuracy, rate) = plt.subplots(1, 3, figsize=(13, 3.6), constrained_layout=True)
    loss.plot(
        [t["step"] for t in train],
        [nan if t.get("loss") is None else t["loss"] for t in train],
        label="training",
        linewidth=1,
    )
    loss.plot([e["step"] for e in evals], [e["loss"] for e in evals], "o-", label="validation", markersize=3)
    loss.set(title="loss", xlabel="step", yscale="log")
    loss.legend(frameon=False)
    accuracy.plot([e["step"] for e in evals], [100 * e["top1"] for e in evals], "o-", label="top-1", markersize=3)
    accuracy.plot([e["step"] for e in evals], [100 * e["top5"] for e in evals], "o-", label="top-5", markersize=3)
    best = max((e["top1"] for e in evals), default=0.0)
    accuracy.set(title=f"validation accuracy, best {best:.2%}", xlabel="step", ylabel="%")
    accuracy.legend(frameon=False)
    rate.plot([t["step"] for t in train], [t["lr"] for t in train], linewidth=1)
    rate.set(title="learning rate", xlabel="step")
    for axes in (loss, accuracy, rate):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    image = io.BytesIO()
    figure.savefig(image, format=out.suffix[1:].lower(), dpi=110)
    plt.close(figure)
    write_output(out, image.getvalue(), "--out")
    return out


def main() -> int:
    protect_output()
    try:
        command = tyro.cli(Report)
        print(printable(draw_curves(command.run, command.out)))
    except UserError as error:
        return report(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Read the goodput of a run folder, and describe it as a table or JSON (`pipeline goodput`)."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from launch.monitor.goodput import Goodput, goodput
from launch.run.metrics_file import METRICS_NAME, read_run
from launch.run.status import StatusContent, read_content
from shards.errors import UserError
from shards.files.lock import STALE_SECONDS
from shards.progress import duration

WIDTH = 80


def read_goodput(run: Path, warn: Callable[[str], object]) -> Goodput:
    """Return the goodput of a run from its metrics and status.

    Args:
        warn: called with a message if lines of the metrics are damaged; they are skipped.

    Raises:
        UserError: the folder is not a run folder, or its metrics are empty or cannot be read.
    """
    lines = read_run(run, warn)
    if not lines:
        raise UserError(f"{run / METRICS_NAME}: contains no lines; start the run, or wait until its first step")
    return goodput_with_status(lines, read_content(run))


def goodput_with_status(lines: Sequence[dict[str, Any]], content: StatusContent | None) -> Goodput:
    """Return the goodput of a run from the lines of its metrics, at least one, and the content of RUN/status."""
    status: str | None = content.status if content else None
    alive: float | None = None  # another status may be that of a later start, which failed before its first line
    if content is not None and status == "running":
        alive = content.at_time or content.time
        status = "killed" if time.time() - content.time > STALE_SECONDS else status
    return goodput(lines, status=status, alive=alive)


def describe(found: Goodput) -> str:
    """Return the categories and the starts of a run as text."""
    count = len(found.starts)
    title = f"goodput {found.goodput:.1%} of {duration(found.wall)} in {count} start{'s' if count > 1 else ''}"
    if found.lost_steps:
        title += f", {found.lost_steps} steps were repeated"
    categories = Table(box=None, pad_edge=False)
    categories.add_column("category")
    categories.add_column("time", justify="right")
    categories.add_column("of wall time", justify="right")
    for name, fraction in found.fractions.items():
        categories.add_row(name, duration(found.categories[name]), f"{fraction:.1%}")
    categories.add_row("wall time", duration(found.wall), f"{1:.1%}")
    starts = Table(box=None, pad_edge=False)
    for name in ("start", "ranks", "from step", "to step", "lost", "wall time", "goodput"):
        starts.add_column(name, justify="right")
    starts.add_column("ended", overflow="fold")
    for start in found.starts:
        counts = (start.first_step, start.last_step, start.lost_steps)
        ranks = "?" if start.world is None else str(start.world)
        figures = (duration(start.wall), f"{start.goodput:.1%}", start.ended)
        starts.add_row(str(start.number), ranks, *map(str, counts), *figures)
    text = io.StringIO()
    console = Console(width=WIDTH, file=text)
    console.print(title, "", categories, "", starts, sep="\n")
    lines = [line.rstrip() for line in text.getvalue().rstrip().splitlines()]
    if found.running:
        lines.append("the run is still running: the figures are up to its last line")
    return "\n".join((*lines, *(f"note: {note}" for note in found.notes)))

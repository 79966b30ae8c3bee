"""Render the page of the report: report.html.j2 with the texts of runs, which are untrusted, and report.css."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from launch.monitor.curves import is_long
from launch.monitor.panels import Timeline
from launch.report.charts import charts, run_keys
from launch.report.loaded_run import LoadedRun
from launch.report.mistakes import mistakes
from launch.report.options import chosen, differences, environment, options
from launch.report.slow_ranks import slow_periods
from launch.report.summary import clock, paper_accuracy, summarize
from shards.files.output import MARK
from shards.progress import duration
from shards.redact import printable

FOLDER = Path(__file__).parent
SHORT = 0.05  # seconds that are not shown


@dataclass(frozen=True)
class Share:
    """A category of the wall time."""

    name: str
    number: int
    """Place among all categories, which gives its color."""
    seconds: str
    fraction: float


def render(runs: Sequence[LoadedRun]) -> str:
    """Return the HTML page about one run, or about several runs in comparison."""
    environment_ = Environment(
        loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, finalize=_printable,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment_.filters["clock"] = clock
    timelines = [run.timeline for run in runs]
    papers = sorted({paper for run in runs if (paper := paper_accuracy(run)) is not None})
    several = len(runs) > 1
    only = runs[0]
    return environment_.get_template("report.html.j2").render(
        css=Markup((FOLDER / "report.css").read_text(encoding="utf-8")),
        generator=MARK,
        now=clock(time.time()),
        several=several,
        summaries=[summarize(run) for run in runs],
        charts=charts(timelines, papers),
        keys=run_keys(timelines) if several else [],
        marks=_marks(timelines),
        papers=[name for _, name in papers],
        times=[_shares(run) for run in runs],
        starts=[] if several else _starts(only),
        slow_periods=[] if several else slow_periods(only.timeline.final),
        differences=differences(runs) if several else [],
        mistakes=mistakes(only.evaluation, only.classes) if not several and only.evaluation else None,
        options=options(only.saved) if not several and only.saved else [],
        chosen={} if several else chosen(only),
        environment=environment(only.saved) if not several and only.saved else {},
        notes=[note for run in runs for note in run.notes],
    )


def _marks(runs: Sequence[Timeline]) -> list[str]:
    """Return what the marks in the charts mean."""
    marks = []
    if any(len(run.starts) > 1 for run in runs):
        marks.append("Dotted vertical lines: the processes were restarted.")
    if any(line["kind"] == "train" for run in runs for line in run.lost):
        marks.append("Gray: steps that were lost in a crash and repeated.")
    if any(is_long(sum(line["kind"] == "train" for line in run.final)) for run in runs):
        marks.append("Pale: logged intervals, under their mean.")
    return marks


def _shares(run: LoadedRun) -> list[Share]:
    """Return the categories of the wall time on which some of it was spent."""
    return [
        Share(name, number, duration(seconds), run.goodput.fractions[name])
        for number, (name, seconds) in enumerate(run.goodput.categories.items())
        if seconds >= SHORT
    ]


def _starts(run: LoadedRun) -> list[dict[str, Any]]:
    heads = iter(run.timeline.starts)
    rows = []
    for start in run.goodput.starts:
        head = next(heads, {}) if start.world is not None else {}  # None: its "start" line is missing
        rows.append(
            {
                "number": start.number,
                "started": clock(head["started"]) if head else "unknown",
                "ranks": start.world or "unknown",
                "host": head.get("host", "unknown"),
                "steps": f"{start.first_step:,} to {start.last_step:,}",
                "lost": f"{start.lost_steps:,}",
                "ended": start.ended,
                "wall": duration(start.wall),
                "goodput": f"{start.goodput:.0%}",
            }
        )
    return rows


def _printable(value: Any) -> Any:
    """Escape control characters in every text of the page; jinja escapes HTML."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value

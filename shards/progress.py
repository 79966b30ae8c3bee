"""Show the progress of a long job: one live line on a terminal, otherwise log lines.

Files and dumb terminals receive no control codes. Everything is written to standard error.
"""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from shards.redact import printable

if TYPE_CHECKING:
    from rich.progress import Progress as LiveLine
    from rich.progress import ProgressColumn, TaskID

LOG_EVERY = 30.0  # seconds between log lines


class Progress:
    """Shows the progress of a job with a known number of items. A context manager.

    Args:
        what: name of the job, one or two words.
        items: total number of items.
        unit: name of the items.
        shown: whether anything is shown; False on all ranks but one.
    """

    def __init__(self, what: str, items: int, unit: str = "images", *, shown: bool = True) -> None:
        self._what, self._total, self._unit, self._shown = what, items, unit, shown
        self._items = self._bytes = 0
        self._started = self._logged = time.monotonic()
        self._line: LiveLine | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Progress:
        if self._shown and is_terminal():
            from rich.progress import BarColumn
            from rich.table import Column

            bar = BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4))
            self._line = _live_line("{task.description}", bar, "{task.fields[facts]}")
            self._task = self._line.add_task(printable(self._what), total=self._total, facts=self._facts())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._line is not None:
            self._line.stop()
        elif kind is None and self._total and self._shown:
            self._log()

    def update(self, items: int, size: int = 0) -> None:
        """Set the total numbers of items and bytes that are done."""
        self._items, self._bytes = items, size
        if self._line is not None and self._task is not None:
            self._line.update(self._task, completed=items, facts=self._facts())
        elif self._shown and time.monotonic() - self._logged >= LOG_EVERY:
            self._log()

    def _facts(self) -> str:
        """Return counts, rates and the remaining (at the end: the elapsed) time; at most 64 characters, usually."""
        seconds = max(time.monotonic() - self._started, 1e-3)
        rates = f"{self._items / seconds:,.0f}/s" + (f", {self._bytes / seconds / 1e6:,.1f} MB/s" * (self._bytes > 0))
        left = seconds / self._items * (self._total - self._items) if self._items else None
        eta = "" if left is None else f", {duration(left)} left" if left else f", {duration(seconds)}"
        return f"{self._items:,} of {self._total:,} {self._unit}, {rates}{eta}"

    def _log(self) -> None:
        self._logged = time.monotonic()
        print(f"{printable(self._what)}: {self._facts()}", file=sys.stderr, flush=True)


class Phases:
    """Says what a job is doing while its progress cannot be counted in items. A context manager.

    On a terminal, the current phase and its elapsed time are one live line, which disappears at the end. Otherwise,
    each phase is a log line.

    Args:
        what: name of the job, one or two words.
        total: number of phases; None: unknown.
    """

    def __init__(self, what: str, total: int | None = None) -> None:
        self._what, self._total, self._number = what, total, 0
        self._line: LiveLine | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Phases:
        if is_terminal():
            from rich.progress import SpinnerColumn, TimeElapsedColumn

            self._line = _live_line(SpinnerColumn("line"), "{task.description}", TimeElapsedColumn(), transient=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._line is not None:
            self._line.stop()

    def begin(self, phase: str) -> None:
        """Show that a phase begins, which ends the previous one."""
        self._number += 1
        counted = "" if self._total is None else f"{self._number} of {self._total}, "
        text = printable(f"{self._what}: {counted}{phase}")
        if self._line is None:
            print(text, file=sys.stderr, flush=True)
            return
        if self._task is not None:
            self._line.remove_task(self._task)
        self._task = self._line.add_task(text, total=None)

    def note(self, line: str) -> None:
        """Print a lasting line, above the live line."""
        print(printable(line), file=sys.stderr, flush=True)  # rich moves it above the live line


def is_terminal() -> bool:
    """Return whether standard error is a terminal that can move its cursor."""
    return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM", "") not in ("", "dumb")


def duration(seconds: float) -> str:
    """Return a duration such as 4.2 s, 38 s, 0:12:05 or 2 d 03:07:00. A negative one is zero."""
    seconds = max(0.0, seconds)
    if round(seconds) < 60:
        return f"{seconds:.1f} s" if round(seconds, 1) < 10 else f"{seconds:.0f} s"
    days, rest = divmod(round(seconds), 86400)
    hours, rest = divmod(rest, 3600)
    clock = f"{rest // 60:02}:{rest % 60:02}"
    return f"{days} d {hours:02}:{clock}" if days else f"{hours}:{clock}"


def _live_line(*columns: str | ProgressColumn, transient: bool = False) -> LiveLine:
    """Start a live line that is never wrapped: texts that do not fit end in an ellipsis."""
    from rich.console import Console
    from rich.progress import Progress as LiveLine
    from rich.progress import TextColumn
    from rich.table import Column

    parts = [
        TextColumn(part, markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
        if isinstance(part, str)
        else part
        for part in columns
    ]
    # What is printed meanwhile appears above the live line, but standard output may also be a file.
    redirected = sys.stdout is not None and sys.stdout.isatty()
    line = LiveLine(*parts, console=Console(stderr=True), transient=transient, expand=True, redirect_stdout=redirected)
    line.start()
    return line

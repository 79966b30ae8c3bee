"""Show the progress of a long job: a progress bar on a terminal, otherwise a log line every 30 s."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from shards.redact import printable

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

LOG_EVERY = 30.0  # seconds between log lines


class Progress:
    """Shows the progress of a job with a known number of items. A context manager.

    Args:
        what: name of the job, one or two words.
        items: total number of items.
        unit: name of the items.
    """

    def __init__(self, what: str, items: int, unit: str = "images") -> None:
        self._what, self._total, self._unit = what, items, unit
        self._items = self._bytes = 0
        self._started = self._logged = time.monotonic()
        self._bar: Bar | None = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.completed:,}/{task.total:,} {task.fields[rate]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(self._what, total=self._total, rate="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None and self._total:
            self._log()

    def update(self, items: int, size: int) -> None:
        """Set the total numbers of items and bytes that are done."""
        self._items, self._bytes = items, size
        if self._bar is not None:
            self._bar.update(self._task, completed=items, rate=self._rates())
        elif time.monotonic() - self._logged >= LOG_EVERY:
            self._log()

    def _rates(self) -> str:
        seconds = max(time.monotonic() - self._started, 1e-3)
        return f"{self._unit}, {self._items / seconds:,.0f}/s, {self._bytes / seconds / 1e6:,.1f} MB/s"

    def _log(self) -> None:
        self._logged = time.monotonic()
        seconds = self._logged - self._started
        left = seconds / self._items * (self._total - self._items) if self._items else 0.0
        eta = f", {left:,.0f} s left" if self._items < self._total else f", {seconds:,.1f} s"
        print(
            f"{printable(self._what)}: {self._items:,} of {self._total:,} {self._rates()}{eta}",
            file=sys.stderr,
            flush=True,
        )

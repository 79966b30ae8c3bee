"""Show the progress of a run on standard error of rank 0: a live view on a terminal, otherwise lines with the time.

It is created before the large libraries are imported, so that the first line appears at once: this file imports only
the standard library and, on a terminal, rich.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

from launch.monitor.view import View
from shards.progress import LOG_EVERY, is_terminal
from shards.redact import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live

REFRESH_PER_SECOND = 4


class Display:
    """Progress and messages of one rank; all ranks other than 0 show nothing.

    Args:
        enabled: whether anything is shown. None: on rank 0 only.
        file: where to write. None: standard error.
    """

    def __init__(self, *, enabled: bool | None = None, file: TextIO | None = None) -> None:
        self._enabled, self._file = enabled, file
        self._terminal = file is None and is_terminal()
        self._console: Console | None = None
        self._live: Live | None = None
        self._lock = threading.RLock()
        self.view = View()

    @property
    def console(self) -> Console:
        if self._console is None:
            from rich.console import Console

            self._console = Console(file=self._file or sys.stderr, highlight=False, emoji=False)
        return self._console

    @property
    def enabled(self) -> bool:
        """Whether anything is shown; without `enabled`, on rank 0 only, whose number the launcher sets."""
        return os.environ.get("RANK", "0") == "0" if self._enabled is None else self._enabled

    def phase(self, text: str) -> None:
        """Say what is being done before training, such as "reading the index"."""
        if not self.enabled:
            return
        if self._terminal:
            from rich.spinner import Spinner

            self._show(Spinner("dots", printable(text)))
        else:
            self.print(text)

    def start(self, view: View) -> None:
        """Begin to show the live view, in place of the phases."""
        self.view = view
        if self.enabled and self._terminal:
            self._show(view)

    def _show(self, shown: object) -> None:
        from rich.live import Live

        with self._lock, contextlib.suppress(OSError):  # the terminal may have been closed
            if self._live is None:
                self._live = Live(
                    shown,  # type: ignore[arg-type]
                    console=self.console,
                    refresh_per_second=REFRESH_PER_SECOND,
                    transient=True,
                    vertical_overflow="crop",
                    redirect_stdout=sys.stdout.isatty(),  # standard output may be a file
                )
                self._live.start()
            else:
                self._live.update(shown, refresh=True)  # type: ignore[arg-type]

    def print(self, text: str) -> None:
        """Print a line with the time, above the live view if there is one."""
        if not self.enabled:
            return
        line = printable(text)
        with contextlib.suppress(OSError):  # the terminal may have been closed, or the disk may be full
            if self._terminal:
                self.console.print(f"{time.strftime('%H:%M:%S')} {line}", markup=False)
            else:
                print(f"{time.strftime('%F %T')} {line}", file=self._file or sys.stderr, flush=True)

    def show_interval(self) -> None:
        """Show the numbers of a new interval, which the caller has stored in `view`."""
        if not self._terminal:
            self.print(self.view.line())

    def log_evaluation(self, text: str) -> None:
        """Print the progress of an evaluation, if there is no terminal, which shows it in the live view."""
        if not self._terminal:
            self.print(text)

    @contextlib.contextmanager
    def evaluating(self, what: str, images: int) -> Iterator[EvaluationProgress]:
        """Show the progress of an evaluation of `images` images; yield its counter."""
        progress = EvaluationProgress(self, what, images)
        try:
            yield progress
        finally:
            self.view.phase = ""

    def close(self) -> None:
        """Remove the live view."""
        with self._lock, contextlib.suppress(OSError):
            live, self._live = self._live, None
            if live is not None:
                live.stop()


DISPLAY = Display()
"""The display of this process."""


class EvaluationProgress:
    """Counter of the images that have been evaluated."""

    def __init__(self, display: Display, what: str, images: int) -> None:
        self._display, self._what, self._images = display, what, images
        self._done, self._logged = 0, time.monotonic()
        self.advance(0)

    def advance(self, images: int) -> None:
        self._done = min(self._done + images, self._images)
        text = f"evaluating the {self._what}: {self._done:,} of {self._images:,} images"
        self._display.view.phase = text
        if time.monotonic() - self._logged >= LOG_EVERY:
            self._logged = time.monotonic()
            self._display.log_evaluation(text)

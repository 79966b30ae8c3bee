"""Show the progress of training on the terminal of rank 0."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from shards.redact import printable


class Display:
    """Shows progress on stderr of rank 0: a progress bar on a terminal, otherwise a line per interval."""

    def __init__(self, *, enabled: bool, total_steps: int, done: int) -> None:
        self._enabled = enabled
        self._total = total_steps
        self.console = Console(file=sys.stderr, quiet=not enabled, highlight=False)
        self._bar: Bar | None = None
        if enabled and self.console.is_terminal:
            self._bar = Bar(
                TextColumn("[bold]train"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}", markup=False),
                console=self.console,
            )
            self._task = self._bar.add_task("", total=total_steps, completed=done)
            self._bar.start()

    def print(self, text: str) -> None:
        """Print a line (above the progress bar)."""
        self.console.print(printable(text), markup=False, soft_wrap=True)

    def update(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def show_interval(self, step: int, epoch: int, lr: float, values: dict[str, Any]) -> None:
        loss, norm = (float("nan") if values[name] is None else values[name] for name in ("loss", "grad_norm"))
        text = (
            f"epoch {epoch} loss {loss:.3f} lr {lr:.2e} norm {norm:.2f} "
            f"{values['images_per_second']:.0f} img/s, MFU {values.get('mfu', 0):.1%}, "
            f"waiting for data {values['data_wait']:.1%}"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        else:
            self.print(f"step {step}/{self._total} {text}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

"""The numbers of the live view and of log lines, and their layout. Imports rich only when it is drawn."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from shards.progress import duration
from shards.redact import printable

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

GAP = "   "  # between items of one line
WIDE = 140  # columns from which two subjects share a line
SMOOTHING = 0.8  # weight of earlier intervals in the recent duration of a step, from which the ETA is computed


@dataclass
class View:
    """What the live view shows. The training loop only stores numbers; rich's thread formats them."""

    title: str = ""
    """Name of the run and of the model."""
    step: int = 0
    first_step: int = 0
    """Step from which this start began."""
    total_steps: int = 0
    epochs: int = 0
    steps_per_epoch: int = 1
    phase: str = ""
    """What is done instead of training, such as an evaluation; empty: training."""
    seconds: float = 0.0
    """Training time of earlier starts of the run."""
    started: float = field(default_factory=time.monotonic)
    """Start of this start's training by `time.monotonic`."""
    step_seconds: float | None = None
    """Recent duration of a step, with its share of evaluations and checkpoints, divided by `_cost` of the step; None:
    not measured yet."""
    sizes: Sequence[tuple[int, int]] = ((0, 0),)
    """Image sizes in pixels, each with its first step, in ascending order of the steps from 0."""
    loss: float | None = None
    grad_norm: float | None = None
    lr: float | None = None
    last_accuracy: str = ""
    best_accuracy: str = ""
    images_per_second: float | None = None
    average_images_per_second: float | None = None
    data_wait: float | None = None
    communication: float | None = None
    mfu: float | None = None
    memory_bytes: int = 0
    slowest: str | None = None
    """The slowest rank of the last minute, its host, by how much it is behind, and why; None: not measured."""
    checkpoint_at: float | None = None
    """Time of the last checkpoint by `time.monotonic`; None: none has been written in this start."""
    skipped: int = 0
    replaced: int = 0
    evaluation_seconds: float = 0.0
    """Duration of evaluations per training step."""
    _images: float = 0.0
    _seconds: float = 0.0

    def update(self, line: Mapping[str, Any], global_batch: int) -> None:
        """Take the numbers of a "train" line (launch/run/metrics_schema.py)."""
        steps, seconds, first = line["steps"], line["seconds"], line["first_step_seconds"]
        if first is not None:  # the first step compiles, so it says little about the others
            steps, seconds = steps - 1, seconds - first
        self._images += steps * global_batch
        self._seconds += seconds
        self.average_images_per_second = self._images / self._seconds if self._images else None
        if steps:
            recent, old = (seconds / steps + self.evaluation_seconds) / self._cost(self.step - 1), self.step_seconds
            self.step_seconds = recent if old is None else SMOOTHING * old + (1 - SMOOTHING) * recent
        for name in ("loss", "grad_norm", "images_per_second", "data_wait", "memory_bytes", "skipped", "replaced"):
            setattr(self, name, line[name])
        self.lr, self.mfu, self.communication = line["lr"], line.get("mfu"), line.get("communication")
        if line.get("slowest_rank") is not None:
            cause = f", {line['cause']}" if line["cause"] else ""
            self.slowest = f"{line['slowest_rank']} on {line['slowest_host']} (+{line['behind']:.0%}{cause})"

    @property
    def epoch(self) -> int:
        """Epoch of the last step, from 1."""
        return max(0, self.step - 1) // max(1, self.steps_per_epoch) + 1

    @property
    def elapsed(self) -> float:
        """Seconds of training in all starts of the run."""
        return self.seconds + time.monotonic() - self.started

    @property
    def eta(self) -> float | None:
        """Estimated seconds until the run ends; None: unknown."""
        seconds, done = self.step_seconds, self.step - self.first_step
        if seconds is None and done > 1:  # a first estimate, which includes compilation
            seconds = (time.monotonic() - self.started) / done / self._cost(self.step - 1)
        if seconds is None:
            return None
        ends = [*(first for first, _ in self.sizes[1:]), self.total_steps]
        firsts = [max(first, self.step) for first, _ in self.sizes]
        return seconds * sum(
            max(min(end, self.total_steps) - first, 0) * self._cost(first)
            for first, end in zip(firsts, ends, strict=True)
        )

    def _size(self, step: int) -> int:
        return self.sizes[bisect_right(self.sizes, step, key=lambda each: each[0]) - 1][1]

    def _cost(self, step: int) -> float:
        """Return the duration of a step relative to others: the pixels of an image, if the size changes."""
        return 1.0 if len(self.sizes) == 1 else float(self._size(step) ** 2)

    def rows(self) -> list[list[str]]:
        """Return the items of the view by subject; an item is never divided between two lines."""
        eta = "ETA -" if self.eta is None else f"ETA {duration(self.eta)}"
        return [
            [f"epoch {self.epoch} of {self.epochs}", f"step {self.step:,} of {self.total_steps:,}"],
            [f"elapsed {duration(self.elapsed)}", eta],
            self._training(),
            [name for name in (self.last_accuracy, self.best_accuracy) if name],
            self._speed(),
            self._health(),
        ]

    def _training(self) -> list[str]:
        if self.lr is None:
            return []
        items = ["loss not finite" if self.loss is None else f"loss {self.loss:.3f}", f"learning rate {self.lr:.2e}"]
        return items + ([] if self.grad_norm is None else [f"gradient norm {self.grad_norm:.2f}"])

    def _speed(self) -> list[str]:
        if self.images_per_second is None or self.data_wait is None:
            return []
        items = [f"{self.images_per_second:,.0f} images/s"]
        if len(self.sizes) > 1:
            items.insert(0, f"{self._size(max(self.step - 1, 0))} pixels")
        if self.average_images_per_second is not None:
            items.append(f"average {self.average_images_per_second:,.0f}")
        items.append(f"waiting for data {self.data_wait:.1%}")
        items += [] if self.communication is None else [f"communication {self.communication:.1%}"]
        return items + ([] if self.mfu is None else [f"MFU {self.mfu:.1%}"])

    def _health(self) -> list[str]:
        items = [f"GPU memory {self.memory_bytes / 1e9:.1f} GB"] if self.memory_bytes else []
        items += [f"slowest rank {self.slowest}"] if self.slowest else []
        if self.checkpoint_at is not None:
            items.append(f"checkpoint {duration(time.monotonic() - self.checkpoint_at)} ago")
        items += [f"skipped steps {self.skipped:,}"] if self.skipped else []
        return items + ([f"replaced samples {self.replaced:,}"] if self.replaced else [])

    def lines(self, width: int) -> list[str]:
        """Return the view as lines of at most `width` characters."""
        title = f"{self.title}{GAP}{self.phase}" if self.phase else self.title
        rows = self.rows()
        if width >= WIDE:
            rows = [left + right for left, right in zip(rows[::2], rows[1::2], strict=True)]
        return [title[:width], *(line for row in rows for line in _wrap(row, width))]

    def line(self) -> str:
        """Return one log line about the last interval."""
        (epoch, step), (elapsed, eta), training, _, speed, health = self.rows()
        return ", ".join([epoch, step, elapsed, eta, *training, *speed, *health])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        width = max(20, options.max_width - 1)  # a full last column would make some terminals wrap
        title, *lines = (Text(printable(line), no_wrap=True) for line in self.lines(width))
        title.stylize("bold")
        table = Table.grid()
        table.add_row(title)
        table.add_row(ProgressBar(total=max(1, self.total_steps), completed=self.step, width=width))
        for line in lines:
            table.add_row(line)
        yield table


def _wrap(items: list[str], width: int) -> list[str]:
    """Join items to lines of at most `width` characters."""
    lines: list[str] = []
    for item in items:
        if lines and len(lines[-1]) + len(GAP) + len(item) <= width:
            lines[-1] += GAP + item
        else:
            lines.append(item[:width])
    return lines

"""What the ranks have recorded (rank.py): the batches of every step, and when it was done."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

_NAME = re.compile(r"start-(\d+)-rank-(\d+)\.jsonl")


class Batch(NamedTuple):
    """A global batch."""

    ids: tuple[int, ...]
    pixels: tuple[str, ...]
    """Hashes of the images."""


class DoneStep(NamedTuple):
    """A step that all ranks have done."""

    time: float
    """time.monotonic() when the last rank had done it."""
    start: int
    step: int
    """Counted from 0."""
    seconds: float
    """Duration on rank 0, without waiting for data."""


@dataclass
class StartRecord:
    """What the ranks of one start have recorded."""

    number: int
    world: int = 0
    begun: dict[int, dict[int, Batch]] = field(default_factory=dict)
    """By step and rank: the rows of the rank."""
    done: dict[int, dict[int, tuple[float, float]]] = field(default_factory=dict)
    """By step and rank: time of the end, and duration."""

    def batch(self, step: int) -> Batch | None:
        """Return the global batch of a step; None: not all ranks have begun it."""
        rows = self.begun.get(step, {})
        if len(rows) < self.world:
            return None
        ordered = [rows[rank] for rank in range(self.world)]
        return Batch(tuple(i for part in ordered for i in part.ids), tuple(p for part in ordered for p in part.pixels))

    def is_done(self, step: int) -> bool:
        """Return whether all ranks have done a step."""
        return len(self.done.get(step, {})) == self.world > 0


class Records:
    """The records in a folder, read as they grow."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.starts: dict[int, StartRecord] = {}
        self.steps: list[DoneStep] = []
        """Steps that all ranks have done, in the order in which they were read."""
        self._read: dict[Path, int] = {}

    def update(self, *, first: int = 0) -> None:
        """Read the lines that were added since the last call by the starts from number `first` on."""
        for path in sorted(self.folder.iterdir()):
            match = _NAME.fullmatch(path.name)
            if match and int(match[1]) >= first:
                start = self.starts.setdefault(int(match[1]), StartRecord(int(match[1])))
                for line in self._new_lines(path):
                    self._add(start, json.loads(line))

    def _new_lines(self, path: Path) -> list[bytes]:
        with path.open("rb") as file:
            file.seek(self._read.get(path, 0))
            content = file.read()
        content = content[: content.rfind(b"\n") + 1]  # a rank may be writing the last line, or was killed in it
        self._read[path] = self._read.get(path, 0) + len(content)
        return content.splitlines()

    def _add(self, start: StartRecord, line: dict[str, object]) -> None:
        step, rank = int(line["step"]), int(line["rank"])  # type: ignore[call-overload]
        if line["kind"] == "begin":
            start.world = int(line["world"])  # type: ignore[call-overload]
            rows = Batch(tuple(line["ids"]), tuple(line["pixels"]))  # type: ignore[arg-type]
            start.begun.setdefault(step, {})[rank] = rows
            return
        found = start.done.setdefault(step, {})
        found[rank] = (float(line["time"]), float(line["seconds"]))  # type: ignore[arg-type]
        if start.is_done(step):
            self.steps.append(DoneStep(max(time for time, _ in found.values()), start.number, step, found[0][1]))

    def first_step(self, start: int) -> int | None:
        """Return the step with which a start began; None: it has not begun any."""
        record = self.starts.get(start)
        return min(record.begun) if record is not None and record.begun else None

    def executions(self) -> Iterator[tuple[int, int, Batch]]:
        """Yield (start, step, batch) of every step that all ranks of a start have begun."""
        for number, start in sorted(self.starts.items()):
            for step in sorted(start.begun):
                batch = start.batch(step)
                if batch is not None:
                    yield number, step, batch

    def final(self) -> dict[int, StartRecord]:
        """Return for every step the last start that began it: its result is in the weights."""
        return {step: start for _, start in sorted(self.starts.items()) for step in sorted(start.begun)}

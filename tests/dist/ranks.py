"""Ranks that record their batches (record_batches.py), and the records that they write."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.dist.forked import Launcher

Sequence = dict[int, tuple[list[int], list[str]]]
"""Ids and image hashes of the global batch, by step."""


@dataclass(frozen=True)
class Record:
    """Batches that the ranks of one launch have recorded."""

    steps: Sequence
    """Batches of the steps that every rank has finished."""
    loose: dict[tuple[int, int], tuple[list[int], list[str]]]
    """Ids and hashes by (step, rank), of the steps that only some ranks have finished."""
    state: dict[str, int] | None
    """State of the loaders after the last step that every rank has finished; None: no such step."""
    done: bool
    """Whether every rank has finished all of its steps."""


class Ranks:
    """Starts ranks with the same recipe, any number of times.

    Args:
        launcher: launcher of the ranks.
        folder: folder for the records.
        options: options of launch/train.py.
        environment: environment variables of the ranks.
    """

    def __init__(self, launcher: Launcher, folder: Path, *options: str | Path, **environment: str) -> None:
        self._launcher, self._folder, self._options, self._environment = launcher, folder, options, environment
        self._launches = 0

    def start(self, world: int, start: int, stop: int = 0, *, kind: str = "train", pace: float = 0.0) -> None:
        """Start `world` ranks; the arguments are those of record_batches.py."""
        self._launches += 1
        self._out.mkdir(parents=True)
        self._world = world
        arguments = (self._out, kind, start, stop, pace, *self._options)
        self._launcher.start("tests.dist.record_batches", *arguments, ranks=world, **self._environment)

    def join(self) -> Record:
        """Wait for the ranks to end, and return their record."""
        self._launcher.join()
        return self.record()

    def kill(self) -> Record:
        """Kill all ranks, and return what they have recorded."""
        self._launcher.kill()
        return self.record()

    def record(self) -> Record:
        """Return what the ranks have recorded so far."""
        logs = [_lines(self._out / f"rank-{rank}.jsonl") for rank in range(self._world)]
        lines = [[line for line in log if line != "done"] for log in logs]
        common = min(len(log) for log in lines)
        steps: Sequence = {}
        for same_step in zip(*(log[:common] for log in lines), strict=True):
            (step,) = {line["step"] for line in same_step}
            steps[step] = (_joined(same_step, "ids"), _joined(same_step, "pixels"))
        loose = {
            (line["step"], rank): (line["ids"], line["pixels"])
            for rank, log in enumerate(lines)
            for line in log[common:]
        }
        state = lines[0][common - 1]["state"] if common else None
        return Record(steps, loose, state, all(log and log[-1] == "done" for log in logs))

    @property
    def _out(self) -> Path:
        return self._folder / f"launch-{self._launches}"


def _joined(lines: tuple[dict[str, Any], ...], key: str) -> list[Any]:
    return [entry for line in lines for entry in line[key]]


def _lines(path: Path) -> list[Any]:
    """Return the complete lines of a file whose writer may have been killed."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

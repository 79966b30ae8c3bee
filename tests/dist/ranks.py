"""Ranks that record what they are fed (record_batches.py), and what came of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.dist.forked import Launcher

Sequence = dict[int, tuple[list[int], list[str]]]
"""Step -> ids and pixel hashes of the whole global batch."""


@dataclass(frozen=True)
class Record:
    """What the ranks of one launch have written."""

    steps: Sequence
    """Of the steps that every rank has finished."""
    loose: dict[tuple[int, int], tuple[list[int], list[str]]]
    """(step, rank) -> ids and hashes, of all others."""
    state: dict[str, int] | None
    """Of the loaders after the last step that every rank has finished."""
    done: bool
    """Whether every rank has reached its end."""


class Ranks:
    """Starts ranks of one recipe, again and again.

    Args:
        folder: for what they write.
        options: of launch/train.py.
        environment: variables of the ranks.
    """

    def __init__(self, launcher: Launcher, folder: Path, *options: str | Path, **environment: str) -> None:
        self._launcher, self._folder, self._options, self._environment = launcher, folder, options, environment
        self._launches = 0

    def start(self, world: int, start: int, stop: int = 0, *, kind: str = "train", pace: float = 0.0) -> None:
        """Start ranks, as record_batches.py says."""
        self._launches += 1
        self._out.mkdir(parents=True)
        self._world = world
        arguments = (self._out, kind, start, stop, pace, *self._options)
        self._launcher.start("tests.dist.record_batches", *arguments, ranks=world, **self._environment)

    def join(self) -> Record:
        """Wait for the end of the ranks of the last start."""
        self._launcher.join()
        return self.record()

    def kill(self) -> Record:
        """Kill them all, and take what they have left."""
        self._launcher.kill()
        return self.record()

    def record(self) -> Record:
        """What is written so far."""
        logs = [_lines(self._out / f"rank-{rank}.jsonl") for rank in range(self._world)]
        lines = [[line for line in log if line != "done"] for log in logs]
        whole = min(len(log) for log in lines)
        steps: Sequence = {}
        for same_step in zip(*(log[:whole] for log in lines), strict=True):
            (step,) = {line["step"] for line in same_step}
            steps[step] = (_joined(same_step, "ids"), _joined(same_step, "pixels"))
        loose = {
            (line["step"], rank): (line["ids"], line["pixels"])
            for rank, log in enumerate(lines)
            for line in log[whole:]
        }
        state = lines[0][whole - 1]["state"] if whole else None
        return Record(steps, loose, state, all(log and log[-1] == "done" for log in logs))

    @property
    def _out(self) -> Path:
        return self._folder / f"launch-{self._launches}"


def _joined(lines: tuple[dict[str, Any], ...], key: str) -> list[Any]:
    return [entry for line in lines for entry in line[key]]


def _lines(path: Path) -> list[Any]:
    """The whole lines of a file whose writer may have been killed."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

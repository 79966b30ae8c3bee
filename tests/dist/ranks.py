"""Forked ranks that record what they are fed (record_batches.py), and what came of them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.dist.launching import ROOT, environment

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
    """Starts ranks of one recipe, again and again. A context manager.

    Args:
        folder: for what they write.
        options: of launch/train.py.
    """

    def __init__(self, folder: Path, *options: str | Path) -> None:
        self._folder, self._launches = folder, 0
        self._process = subprocess.Popen(
            [sys.executable, "tests/dist/record_batches.py", *map(str, options)],
            cwd=ROOT,
            env=environment(folder),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def start(self, world: int, start: int, stop: int = 0, *, kind: str = "train", pace: float = 0.0) -> list[int]:
        """Start ranks; returns their process ids."""
        self._launches += 1
        self._out.mkdir(parents=True)
        self._world = world
        command = {"kind": kind, "world": world, "start": start, "stop": stop, "pace": pace, "out": str(self._out)}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return list(json.loads(self._answer()))

    def join(self) -> Record:
        """Wait for the end of the ranks of the last start."""
        assert self._answer() == "ended"
        return self.record()

    def kill(self, pids: list[int]) -> Record:
        """Kill them all, and take what they have left."""
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.kill(pid, signal.SIGKILL)
        return self.join()

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

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the ranks' parent has died"
        return line.strip()


def _joined(lines: tuple[dict[str, Any], ...], key: str) -> list[Any]:
    return [entry for line in lines for entry in line[key]]


def _lines(path: Path) -> list[Any]:
    """The whole lines of a file whose writer may have been killed."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

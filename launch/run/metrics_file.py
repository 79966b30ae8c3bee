"""Write and read RUN/metrics.jsonl, an append-only file of JSON lines that rank 0 writes."""

from __future__ import annotations

import collections
import contextlib
import errno
import itertools
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from math import inf
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from launch.run.files import open_regular
from launch.run.metrics_schema import EVALUATIONS, KINDS, Line, Resolved
from shards.errors import UserError, storage_error
from shards.redact import redacted
from shards.schema import parse_json

METRICS_NAME = "metrics.jsonl"
MAX_BYTES = 1 << 30
"""Maximum size that is read. A line has about 300 bytes, and a reader needs several times the size of the file."""
_LINE_LIMIT = 1 << 20

log = logging.getLogger(__name__)


class MetricsLog:
    """Writes metrics.jsonl. On ranks other than 0, `folder` is None and nothing is written.

    Write errors do not end the run: lines are kept in memory, and written in order when the file can be written again.
    `messages` returns one message when such a failure begins, and one when it ends.
    """

    def __init__(self, folder: Path | None) -> None:
        self._path = folder / METRICS_NAME if folder else None
        self._handle: int | None = None
        self._pending: collections.deque[bytes] = collections.deque()
        self._problem = ""
        self._messages: list[str] = []

    def write(self, kind: str, **values: Any) -> None:
        """Write a line with its kind, the time and `values` (launch/run/metrics_schema.py)."""
        if self._path is None:
            return
        line = json.dumps(redacted({"kind": kind, "time": round(time.time(), 3), **values})) + "\n"
        self._pending.append(line.encode())
        self._flush(self._path)

    @property
    def unwritten(self) -> bytes:
        """The lines that could not be written so far."""
        return b"".join(self._pending)

    def messages(self) -> list[str]:
        """Return messages since the last call."""
        messages, self._messages = self._messages, []
        return messages

    def close(self) -> list[str]:
        """Write pending lines; return messages."""
        if self._path is not None:
            self._flush(self._path)
            if self._pending:
                self._messages.append(
                    f"warning: {self._path}: {len(self._pending)} lines could not be written ({self._problem}); "
                    "checkpoints are not affected"
                )
            self._close_file()
        return self.messages()

    def _flush(self, path: Path) -> None:
        """Write the pending lines, if the file can be written."""
        pending = len(self._pending)
        try:
            if self._handle is not None and os.fstat(self._handle).st_nlink == 0:  # the file has been removed
                self._close_file()
            if self._handle is None:
                self._handle = open_regular(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
            while self._pending:
                _append(self._handle, self._pending[0])
                self._pending.popleft()
        except OSError as error:
            if not self._problem:
                self._messages.append(
                    f"warning: {path}: cannot be written ({error.strerror}); lines are kept in memory until it can be "
                    "written again"
                )
            self._problem = error.strerror or str(error)
            self._close_file()
        else:
            if self._problem:
                self._messages.append(f"note: {path}: {pending} lines that were kept in memory have been written")
            self._problem = ""

    def _close_file(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            with contextlib.suppress(OSError):  # network file systems may report earlier write errors on close
                os.close(handle)


def _append(handle: int, line: bytes) -> None:
    """Append a complete line. If the disk is full, remove the part of the line that has been written."""
    size = os.fstat(handle).st_size
    if size and os.pread(handle, 1, size - 1) != b"\n":  # an earlier process was killed while it wrote a line
        line = b"\n" + line
    try:
        while line:
            line = line[os.write(handle, line) :]
    except OSError:
        os.ftruncate(handle, size)
        raise


def append_missing(run: Path, lines: bytes) -> None:
    """Append the lines that metrics.jsonl does not have.

    Raises:
        OSError: the file cannot be read or written.
    """
    handle = open_regular(run / METRICS_NAME, os.O_RDWR | os.O_APPEND | os.O_CREAT)
    with open(handle, "rb", closefd=True) as file:
        written = set(file)
        for line in lines.splitlines(keepends=True):
            if line not in written:
                _append(handle, line)


def check_metrics(run: Path) -> None:
    """Check that metrics.jsonl is a regular file, if it exists.

    Raises:
        UserError: it is a folder, a FIFO or a device.
    """
    try:
        os.close(open_regular(run / METRICS_NAME))
    except IsADirectoryError as error:
        raise UserError(f"{run / METRICS_NAME}: {error.strerror}; move it away, or use another run folder") from None
    except OSError:
        pass  # the file does not exist yet or cannot be read; `MetricsLog` reports write errors


def read_metrics(folder: Path, warn: Callable[[str], object] = log.warning) -> list[dict[str, Any]]:
    """Return all lines of a run, of all its starts, in the order in which they were written.

    Damaged lines, for example after a power failure, are skipped.

    Args:
        warn: called once with the number of damaged lines, if there are any.

    Raises:
        OSError: the file is missing, not a regular file, larger than `MAX_BYTES`, or cannot be read.
    """
    lines: list[dict[str, Any]] = []
    damaged = 0
    with open(open_regular(folder / METRICS_NAME), "rb") as file:
        if (size := os.fstat(file.fileno()).st_size) > MAX_BYTES:
            fact = f"{size:,} bytes, more than the {MAX_BYTES:,} bytes that are allowed"
            raise OSError(errno.EFBIG, fact, str(folder / METRICS_NAME))
        while content := file.readline(_LINE_LIMIT):
            try:
                lines.append(_checked(content))
            except ValueError:
                damaged += 1
    if damaged:
        warn(f"{folder / METRICS_NAME}: skipped {damaged} damaged line{'s' if damaged > 1 else ''}")
    return lines


def read_run(run: Path, warn: Callable[[str], object] = log.warning) -> list[dict[str, Any]]:
    """Return all lines of a run, for commands whose argument is a run folder; see `read_metrics`.

    Raises:
        UserError: the folder is not a run folder, or its metrics cannot be read.
    """
    try:
        return read_metrics(run, warn)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{run}: contains no {METRICS_NAME}, so it is not a run folder; use the --out folder of a training run"
        ) from None
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise UserError(f"{run / METRICS_NAME}: {error.strerror}; use another run folder") from None
        raise storage_error(run / METRICS_NAME, error, "use the --out folder of a training run") from error


def starts(lines: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Return the lines of each start. All begin with a "start" line, except those whose "start" line is missing."""
    found: list[list[dict[str, Any]]] = []
    step = 0
    for line in lines:
        # If a "start" line is damaged, the next start is recognized by its first step, which has been done before.
        repeats = line["kind"] == "train" and line["step"] - line["steps"] < step
        if not found or line["kind"] == "start" or repeats:
            found.append([])
        found[-1].append(line)
        step = line.get("step", 0)
    return found


def first_step(start: Sequence[Mapping[str, Any]]) -> int:
    """Return the number of optimizer steps that were done before a start: 0, or those of its checkpoint."""
    first = start[0]
    return int(first.get("step", 0)) - int(first.get("steps", 0))


def kept_steps(found: Sequence[Sequence[Mapping[str, Any]]]) -> list[float]:
    """Return for each start the last step that no later start has repeated; infinity: none has been repeated."""
    resumed = [*map(first_step, found[1:]), inf][: len(found)]  # nothing if there are no starts
    return list(itertools.accumulate(reversed(resumed), min))[::-1]


def final_timeline(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines of the run without those of steps that a later start repeated.

    Of several evaluations of the same step, the last one is returned.
    """
    found = starts(lines)
    kept = [
        line
        for start, last in zip(found, kept_steps(found), strict=True)
        for line in start
        if line.get("step", 0) <= last
    ]
    newest = {(line["kind"], line["step"]): line for line in kept if line["kind"] in EVALUATIONS}
    return [line for line in kept if newest.get((line["kind"], line.get("step")), line) is line]


_OBJECT: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])


def _checked(content: bytes) -> dict[str, Any]:
    """Parse one line of metrics, and check its fields; fields that are unknown for its kind are dropped.

    Raises:
        ValueError: the line is not a valid metrics line.
    """
    line = parse_json(content, _OBJECT, limit=_LINE_LIMIT)
    kind = KINDS.get(Line.model_validate(line).kind, Line)
    kind.model_validate(line)
    return line if kind is Resolved else {name: value for name, value in line.items() if name in kind.model_fields}

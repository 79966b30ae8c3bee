"""RUN/metrics.jsonl: append-only JSON lines, written by rank 0 and read by reports."""

from __future__ import annotations

import collections
import contextlib
import errno
import json
import logging
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from launch.run.files import open_regular
from launch.run.trackers import Trackers
from shards.errors import UserError
from shards.redact import redacted
from shards.schema import parse_json

METRICS_NAME = "metrics.jsonl"
KEPT_LINES = 10_000
"""Lines kept in memory while the file cannot be written: about 3 MB, or a week at one line per minute."""

_LINE_LIMIT = 1 << 20
_LINE: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])
# What readers of a kind of line compute with. A loss is null where all steps of an interval were skipped.
_EVALUATION = ("step", "epoch", "top1", "top5", "loss", "samples")
_NUMBERS = {
    "train": ("step", "epoch", "lr", "images_per_second"),
    "eval": _EVALUATION,
    "eval-ema": _EVALUATION,
}

log = logging.getLogger(__name__)


class MetricsLog:
    """Append-only JSON lines, and `trackers` of them; on rank 0 only (elsewhere `folder` is None: nothing is written).

    A view of the run, which never ends it: lines that cannot be written are kept in memory and written, in order, when
    the file can be written again. `messages` tells once when that begins and once when it is over.

    Raises:
        UserError: a folder or a fifo has the file's name.
    """

    def __init__(self, folder: Path | None, trackers: Trackers | None = None) -> None:
        self._path = folder / METRICS_NAME if folder else None
        self._handle: int | None = None
        self._line = self._rest = b""  # a line that was written in part, and what is left of it
        self._kept: collections.deque[bytes] = collections.deque()
        self._dropped = 0
        self._problem = ""
        self._messages: list[str] = []
        if self._path is not None:
            check_metrics(self._path.parent)
        self._trackers = trackers
        if folder is not None and trackers is not None:
            trackers.open(folder)

    def write(self, kind: str, **values: Any) -> None:
        """Write one line: its kind ("start", "train", "eval", "end"), the Unix time, and the values."""
        if self._path is None:
            return
        line = json.dumps(redacted({"kind": kind, "time": round(time.time(), 3), **values})) + "\n"
        self._kept.append(line.encode())
        if len(self._kept) > KEPT_LINES:
            self._kept.popleft()
            self._dropped += 1
        self._flush(self._path)
        numbers = {f"{kind}/{name}": value for name, value in values.items() if isinstance(value, int | float)}
        if self._trackers is not None:
            self._trackers.log(numbers, step=values.get("step", 0))

    def messages(self) -> list[str]:
        """Return messages since the last call."""
        told, self._messages = self._messages, []
        return told + (self._trackers.messages() if self._trackers else [])

    def close(self) -> list[str]:
        """Write pending lines and close the trackers; return messages."""
        if self._path is not None:
            self._flush(self._path)
            lost = len(self._kept) + self._dropped + bool(self._rest)
            if lost:
                self._messages.append(
                    f"warning: {self._path}: {lost} lines were not written ({self._problem}); checkpoints do not need "
                    "them"
                )
            self._close_file()
        if self._trackers is not None:
            self._trackers.finish()
        return self.messages()

    def _flush(self, path: Path) -> None:
        """Write all pending lines, if the file can be written."""
        waiting = len(self._kept)
        try:
            if self._handle is not None and os.fstat(self._handle).st_nlink == 0:  # the file was removed
                self._close_file()
            if self._handle is None:
                self._handle = _open_for_appending(path)
            while self._rest or self._kept:
                if not self._rest:
                    self._line = self._rest = self._kept.popleft()
                self._rest = self._rest[os.write(self._handle, self._rest) :]
        except OSError as error:
            if not self._problem:
                self._messages.append(
                    f"warning: {path}: cannot be written ({error.strerror}); its lines are kept in memory, and written "
                    "when it can be"
                )
            self._problem = error.strerror or str(error)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):  # else the handle is still good
                self._close_file()
        else:
            if self._problem:
                lost = f"; {self._dropped} older ones are lost" if self._dropped else ""
                self._messages.append(f"note: {path}: can be written again, {waiting} lines have been{lost}")
            self._problem, self._dropped = "", 0

    def _close_file(self) -> None:
        handle, self._handle = self._handle, None
        if self._rest:
            self._rest = self._line  # the file that is opened next may not hold its first part, or end it there
        if handle is not None:
            with contextlib.suppress(OSError):  # network file systems may report earlier errors here
                os.close(handle)


def check_metrics(run: Path) -> None:
    """Raise an error if the metrics file is not a regular file.

    Raises:
        UserError: a folder, a fifo or a device.
    """
    try:
        os.close(open_regular(run / METRICS_NAME))
    except IsADirectoryError as error:
        raise UserError(f"{run / METRICS_NAME}: {error.strerror}; move it away, or use another run folder") from None
    except OSError:
        pass  # not there yet, or not readable: whether it can be written shows when it is


def read_metrics(folder: Path, warn: Callable[[str], object] = log.warning) -> list[dict[str, Any]]:
    """Read all lines of a run. Where a resumed run repeated steps, a step's later line wins.

    Damaged lines, as after a power cut, are left out.

    Args:
        warn: is told once how many lines are damaged.

    Raises:
        OSError: the file is missing, no file, or cannot be read.
    """
    lines: dict[tuple[str, int], dict[str, Any]] = {}
    damaged = 0
    with open(open_regular(folder / METRICS_NAME), "rb") as file:
        number = 0
        while content := file.readline(_LINE_LIMIT):
            number += 1
            try:
                line = _checked(content)
            except ValueError:
                damaged += 1
                continue
            key = (line["kind"], line.get("step", -number))
            lines.pop(key, None)
            lines[key] = line
    if damaged:
        warn(f"{folder / METRICS_NAME}: left out {damaged} damaged line{'s' if damaged > 1 else ''}")
    return list(lines.values())


def _checked(content: bytes) -> dict[str, Any]:
    """Parse one line of metrics and check its numbers.

    Raises:
        ValueError: the line is not a valid metrics line.
    """
    line = parse_json(content, _LINE, limit=_LINE_LIMIT)
    kind = line.get("kind")
    if not isinstance(kind, str):
        raise ValueError("no kind")
    numbers = {name: line.get(name) for name in _NUMBERS.get(kind, ())}
    if kind == "train" and line.get("loss") is not None:
        numbers["loss"] = line["loss"]
    if "step" in line:
        numbers["step"] = line["step"]
        if not isinstance(line["step"], int):
            raise ValueError("step is not an integer")
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{name} is not a finite number")
    return line


def _open_for_appending(path: Path) -> int:
    """Open the metrics for appending; terminate a partial last line of an earlier process first."""
    handle = open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        size = os.fstat(handle).st_size
        if size and _last_byte(path, size) != b"\n":
            os.write(handle, b"\n")
    except BaseException:
        os.close(handle)
        raise
    return handle


def _last_byte(path: Path, size: int) -> bytes:
    handle = open_regular(path)
    try:
        return os.pread(handle, 1, size - 1)
    finally:
        os.close(handle)

"""One process at a time on one part of a conversion, or in one run folder, on one host or on several that share a file
system.

The kernel's lock (flock) goes when its holder dies, however it dies. Where a file system does not carry it between
hosts, the holder's host and pid in the file, and a beat that keeps the file's time fresh, stand in for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter

from shards.errors import ConversionFailed, StorageFailed
from shards.files.waiting import Wait
from shards.redact import one_line
from shards.schema import parse_json

BEAT = 10.0  # seconds
STALE = 6 * BEAT
WAIT = 1.0
_MAX_OWNER = 4096  # bytes of a lock file


@dataclass(frozen=True)
class Owner:
    """Who holds a lock file: its content."""

    host: Annotated[str, Field(max_length=255)]
    pid: Annotated[int, Field(ge=0)]

    def __str__(self) -> str:
        return f"process {self.pid} on {one_line(self.host)}"


_OWNER = TypeAdapter(Owner)


class LockHeld(ConversionFailed):
    """Another process, described by `owner`, holds the lock."""

    def __init__(self, message: str, owner: str = "another process") -> None:
        super().__init__(message)
        self.owner = owner


@contextlib.contextmanager
def file_lock(path: Path, what: str, wait: float = 0.0) -> Iterator[None]:
    """Hold the lock file `path` while the block runs.

    Args:
        what: what is locked, for the message.
        wait: seconds to wait for the lock before raising. The holder is printed at once, and then once a minute.

    Raises:
        LockHeld: a living process holds it; its host and pid are named.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        _take(handle, path, what, wait)
        stop = threading.Event()
        beat = threading.Thread(target=_beat, args=(path, stop), daemon=True)
        beat.start()
        try:
            yield
        finally:
            stop.set()
            beat.join()
            # A network file system may have lost the file; what is left in it goes stale, and the work is done.
            with contextlib.suppress(OSError):
                os.ftruncate(handle, 0)
    finally:
        with contextlib.suppress(OSError):
            os.close(handle)


def is_locked(path: Path) -> bool:
    """Whether a living process holds the lock file."""
    try:
        with file_lock(path, ""):
            return False
    except LockHeld:
        return True


def _take(handle: int, path: Path, what: str, wait: float) -> None:
    waiting: Wait | None = None
    while True:
        try:
            return _try_to_take(handle, path, what)
        except LockHeld as error:
            if wait <= 0:
                raise
            held = error
        if waiting is None:
            print(f"note: {held}; waiting for it for up to {wait:g} s", file=sys.stderr, flush=True)
            waiting = Wait(f"{path}: held by {held.owner}", limit=wait, remedy="end that process if it does nothing")
        try:
            waiting.pause(min(WAIT, wait))
        except StorageFailed:
            raise held from None


def _try_to_take(handle: int, path: Path, what: str) -> None:
    carried = True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _held(_owner(handle), path, what) from None
    except OSError:  # this file system knows no such locks
        carried = False
    owner = _owner(handle)
    here = socket.gethostname()
    if owner is not None:
        gone = (carried and owner.host == here) or _age(handle, path) > STALE
        if not gone:
            raise _held(owner, path, what)
        print(f"note: {one_line(str(path))}: left by {owner}, which is gone; taken over", file=sys.stderr)
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps({"host": here, "pid": os.getpid()}).encode(), 0)


def _owner(handle: int) -> Owner | None:
    try:
        return parse_json(os.pread(handle, _MAX_OWNER + 1, 0), _OWNER, limit=_MAX_OWNER)
    except ValueError:  # empty, or the holder died while it wrote this
        return None


def _held(owner: Owner | None, path: Path, what: str) -> LockHeld:
    by = str(owner or "another process")
    return LockHeld(
        f"{what} is being worked on by {by}; wait for it, or end it and run the same command (lock: {path})", by
    )


def _age(handle: int, path: Path) -> float:
    """Seconds since the last beat, by the clock that stamps files there."""
    probe = path.with_name(f".{path.name}.{os.getpid()}.now.tmp")
    probe.touch()
    now = probe.stat().st_mtime
    probe.unlink()
    return now - os.fstat(handle).st_mtime


def _beat(path: Path, stop: threading.Event) -> None:
    while not stop.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(path)

"""Lock files, which allow one process at a time to work on a part of a conversion or in a run folder.

A lock works on one host, and on several that share a file system. The kernel releases the lock (flock) when the owner
dies. Not all file systems share flock between hosts, so the file also contains the owner's host and pid, and a
heartbeat updates its modification time.
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

HEARTBEAT_SECONDS = 10.0  # seconds between heartbeats
STALE_SECONDS = 6 * HEARTBEAT_SECONDS  # seconds without a heartbeat after which the owner is considered dead
RETRY_SECONDS = 1.0  # seconds between two attempts to get the lock
_MAX_OWNER = 4096  # maximum size of a lock file, in bytes


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock; the content of the lock file."""

    host: Annotated[str, Field(max_length=255)]
    pid: Annotated[int, Field(ge=0)]

    def __str__(self) -> str:
        return f"process {self.pid} on {one_line(self.host)}"


_OWNER = TypeAdapter(Owner)


class LockHeld(ConversionFailed):
    """Another process (`owner`) holds the lock."""

    def __init__(self, message: str, owner: str = "another process") -> None:
        super().__init__(message)
        self.owner = owner


@contextlib.contextmanager
def file_lock(path: Path, what: str, wait: float = 0.0) -> Iterator[None]:
    """Hold the lock file `path` while the block runs.

    Args:
        what: what is locked, for the message.
        wait: timeout in seconds for the lock. The owner is printed at once, and then once a minute.

    Raises:
        LockHeld: a running process holds the lock; the message names its host and pid.
    """
    # Another user of a shared folder may have made a link: its target would be overwritten.
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        _acquire(handle, path, what, wait)
        stop = threading.Event()
        beat = threading.Thread(target=_update_heartbeat, args=(path, stop), daemon=True)
        beat.start()
        try:
            yield
        finally:
            stop.set()
            beat.join()
            # Ignore errors, such as a file that a network file system lost: an owner that remains in it becomes stale.
            with contextlib.suppress(OSError):
                os.ftruncate(handle, 0)
    finally:
        with contextlib.suppress(OSError):
            os.close(handle)


def is_locked(path: Path) -> bool:
    """Return whether a running process holds the lock file."""
    try:
        with file_lock(path, ""):
            return False
    except LockHeld:
        return True


def _acquire(handle: int, path: Path, what: str, wait: float) -> None:
    waiting: Wait | None = None
    while True:
        try:
            return _try_acquire(handle, path, what)
        except LockHeld as error:
            if wait <= 0:
                raise
            held = error
        if waiting is None:
            print(f"note: {held}; waiting for it for up to {wait:g} s", file=sys.stderr, flush=True)
            waiting = Wait(f"{path}: locked by {held.owner}", limit=wait, remedy="stop that process if it hangs")
        try:
            waiting.pause(min(RETRY_SECONDS, wait))
        except StorageFailed:
            raise held from None


def _try_acquire(handle: int, path: Path, what: str) -> None:
    flock_works = True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _lock_held(_owner(handle), path, what) from None
    except OSError:  # this file system does not support flock
        flock_works = False
    owner = _owner(handle)
    host = socket.gethostname()
    if owner is not None:
        dead = (flock_works and owner.host == host) or _seconds_since_heartbeat(handle, path) > STALE_SECONDS
        if not dead:
            raise _lock_held(owner, path, what)
        print(f"note: {one_line(str(path))}: replacing the lock of {owner}, which no longer runs", file=sys.stderr)
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps({"host": host, "pid": os.getpid()}).encode(), 0)


def _owner(handle: int) -> Owner | None:
    try:
        return parse_json(os.pread(handle, _MAX_OWNER + 1, 0), _OWNER, limit=_MAX_OWNER)
    except ValueError:  # the file is empty, or its owner died while writing it
        return None


def _lock_held(owner: Owner | None, path: Path, what: str) -> LockHeld:
    by = str(owner or "another process")
    return LockHeld(f"{what} is in use by {by}; wait for it, or stop it and run the same command (lock: {path})", by)


def _seconds_since_heartbeat(handle: int, path: Path) -> float:
    """Return the seconds since the last heartbeat, by the clock of the file system."""
    probe = path.with_name(f".{path.name}.{os.getpid()}.now.tmp")
    probe.touch()
    now = probe.stat().st_mtime
    probe.unlink()
    return now - os.fstat(handle).st_mtime


def _update_heartbeat(path: Path, stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(path)

"""One process at a time on one part of a conversion, or in one run folder, on one host or on several that share a file
system.

The kernel's lock (flock) goes when its holder dies, however it dies. Where a file system does not carry it between
hosts, the holder's host and pid in the file, and a beat that keeps the file's time fresh, stand in for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from shards.errors import ConversionFailed

BEAT = 10.0  # seconds
STALE = 6 * BEAT
WAIT = 1.0


class Held(ConversionFailed):
    """Another process holds the lock."""


@contextlib.contextmanager
def hold(path: Path, what: str, wait: float = 0.0) -> Iterator[None]:
    """Hold the lock file `path` while the block runs.

    Args:
        what: what is locked, for the message.
        wait: seconds to wait for whoever holds it, before raising; math.inf = for ever.

    Raises:
        Held: a living process holds it; its host and pid are named.
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


def is_held(path: Path) -> bool:
    """Whether a living process holds the lock file."""
    try:
        with hold(path, ""):
            return False
    except Held:
        return True


def _take(handle: int, path: Path, what: str, wait: float) -> None:
    said, end = False, time.monotonic() + wait
    while True:
        try:
            return _try_to_take(handle, path, what)
        except Held as error:
            if time.monotonic() >= end:
                raise
            if not said:
                limit = "" if math.isinf(wait) else f" for up to {wait:g} s"
                print(f"note: {error}; waiting for it{limit}", file=sys.stderr, flush=True)
            said = True
        time.sleep(min(WAIT, max(0.0, end - time.monotonic())))


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
        gone = (carried and owner["host"] == here) or _age(handle, path) > STALE
        if not gone:
            raise _held(owner, path, what)
        was = f"process {owner['pid']} on {owner['host']}"
        print(f"note: {path}: left by {was}, which is gone; taken over", file=sys.stderr)
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps({"host": here, "pid": os.getpid()}).encode(), 0)


def _owner(handle: int) -> dict[str, object] | None:
    content = os.pread(handle, 4096, 0)
    try:
        owner = json.loads(content) if content else None
    except ValueError:  # the holder died while it wrote this
        return None
    return owner if isinstance(owner, dict) and {"host", "pid"} <= owner.keys() else None


def _held(owner: dict[str, object] | None, path: Path, what: str) -> Held:
    by = f"process {owner['pid']} on {owner['host']}" if owner else "another process"
    return Held(f"{what} is being worked on by {by}; wait for it, or end it and run the same command (lock: {path})")


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

"""Retry reads of local storage after transient errors, and limit the number of warnings."""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from shards.errors import storage_error
from shards.files.waiting import REPEAT_SECONDS

log = logging.getLogger(__name__)

T = TypeVar("T")

RETRY_SECONDS = 10.0
"""Time limit in seconds for retrying a read after a transient error."""
TRANSIENT = frozenset(
    {
        *(errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT, errno.EREMOTEIO, errno.EHOSTDOWN),
        *(errno.EMFILE, errno.ENFILE),
    }
)
"""Transient errors: those of network file systems whose server restarts or is unreachable, and too many open files."""
_PAUSE_SECONDS = 0.2


class WarningThrottle:
    """Limits a warning that many threads may log to one per `REPEAT_SECONDS`. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next = 0.0

    def due(self) -> bool:
        """Return whether to log the warning now. Returns True to one caller per period."""
        with self._lock:
            now = time.monotonic()
            if now < self._next:
                return False
            self._next = now + REPEAT_SECONDS
            return True


_retry_warnings = WarningThrottle()


def read_with_retries(path: Path | str, read: Callable[[], T], *, remedy: str = "copy it again") -> T:
    """Call `read`, and retry it for up to `RETRY_SECONDS` after transient errors.

    Args:
        path: the file, for messages.
        read: opens and reads the file. It must reopen it each time, because a stale NFS handle remains stale.
        remedy: what to do about a missing file.

    Raises:
        ShardSetError: the file is missing.
        StorageFailed: the file cannot be read.
    """
    end = 0.0
    while True:
        try:
            return read()
        except OSError as error:
            now = time.monotonic()
            end = end or now + RETRY_SECONDS
            if error.errno not in TRANSIENT or now >= end:
                raise storage_error(path, error, remedy) from error
            level = logging.WARNING if _retry_warnings.due() else logging.DEBUG
            log.log(level, "%s: %s; retrying for at most %.0f s", path, error.strerror, end - now)
            time.sleep(_PAUSE_SECONDS)

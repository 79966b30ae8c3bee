"""Long waits that say what they wait for, and end."""

from __future__ import annotations

import logging
import time

from shards.errors import StorageFailed

log = logging.getLogger(__name__)

SILENT_SECONDS = 10.0
REPEAT_SECONDS = 60.0


class Wait:
    """One wait for another process, a server or a disk, polled in a loop::

        wait = Wait(f"{path}: locked by process {holder}", limit=1800, remedy="end that process")
        while not ready():
            wait.pause()

    `pause` sleeps in the calling thread, so that Ctrl-C and signal handlers run between two polls.

    Args:
        what: the file or server, and who is waited for; for people.
        limit: seconds after which to give up.
        remedy: what to do then.
    """

    def __init__(self, what: str, *, limit: float, remedy: str) -> None:
        self.what, self.limit, self._remedy = what, limit, remedy
        self._start = time.monotonic()
        self._next_message = self._start + SILENT_SECONDS

    def pause(self, seconds: float = 0.1) -> None:
        """Sleep once; log a warning after 10 s and then once a minute.

        Raises:
            StorageFailed: `limit` is over.
        """
        now = time.monotonic()
        if now - self._start > self.limit:
            raise StorageFailed(f"{self.what}: waited {now - self._start:.0f} s in vain; {self._remedy}")
        if now >= self._next_message:
            log.warning(
                "%s: waiting for %.0f s, for %.0f s at most; %s",
                self.what,
                now - self._start,
                self.limit,
                self._remedy,
            )
            self._next_message = now + REPEAT_SECONDS
        time.sleep(seconds)

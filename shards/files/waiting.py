"""Log long waits with what they wait for, and limit their duration."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

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
        what: what is waited for, and which process holds it, for messages.
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
            StorageFailed: the wait took longer than `limit`.
        """
        now = time.monotonic()
        if now - self._start > self.limit:
            raise StorageFailed(f"{self.what}: waited {now - self._start:.0f} s, the limit; {self._remedy}")
        if now >= self._next_message:
            log.warning(
                "%s: waiting for %.0f s, at most %.0f s; %s",
                self.what,
                now - self._start,
                self.limit,
                self._remedy,
            )
            self._next_message = now + REPEAT_SECONDS
        time.sleep(seconds)


def lock_holder(handle: int) -> str:
    """Describe the process of this machine that holds a flock on an open file; "another process" where none is found.

    The description says whether it is suspended (SIGSTOP, SLURM's gang scheduling), because it then keeps the lock.
    """
    found = os.fstat(handle)
    inode = f":{found.st_ino}"
    device = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}"
    try:
        locks = [line.split() for line in Path("/proc/locks").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return "another process"
    # Waiting processes have an arrow in the second column. Some file systems (btrfs, overlayfs) number their devices
    # in another way here, so the inode alone must do where it is unique.
    holders = {(line[4], line[5]) for line in locks if line[1] == "FLOCK" and line[5].endswith(inode)}
    exact = {pid for pid, file in holders if file == device + inode}
    pids = exact or {pid for pid, _ in holders}
    return describe_process(int(pids.pop())) if len(pids) == 1 else "another process"


def describe_process(pid: int) -> str:
    """Name a process by number and program, and say when it is suspended."""
    try:
        name, _, rest = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")
    except OSError:
        return f"process {pid}"
    suspended = ", suspended" if rest.split()[0] in "Tt" else ""
    # A program can set any name.
    program = "".join(letter if letter.isprintable() else "?" for letter in name.partition("(")[2])
    return f"process {pid} ({program}{suspended})"

"""Log what long waits are waiting for, and limit their duration."""

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
    """A wait for another process, a server or a disk, polled in a loop::

        wait = Wait(f"{path}: locked by process {holder}", limit=1800, remedy="stop that process")
        while not ready():
            wait.pause()

    `pause` sleeps in the calling thread, so that Ctrl-C and signal handlers run between two polls.

    Args:
        what: resource that is waited for, and the process that holds it, for messages.
        limit: timeout in seconds.
        remedy: what to do after the timeout, for messages.
    """

    def __init__(self, what: str, *, limit: float, remedy: str) -> None:
        self.what, self.limit, self._remedy = what, limit, remedy
        self._start = time.monotonic()
        self._next_message = self._start + SILENT_SECONDS

    def pause(self, seconds: float = 0.1) -> None:
        """Sleep once; log a warning after 10 s and then once a minute.

        Raises:
            StorageFailed: the timeout has expired.
        """
        now = time.monotonic()
        if now - self._start > self.limit:
            raise StorageFailed(f"{self.what}: timed out after {now - self._start:.0f} s; {self._remedy}")
        if now >= self._next_message:
            log.warning(
                "%s: still waiting after %.0f s, timeout %.0f s; %s",
                self.what,
                now - self._start,
                self.limit,
                self._remedy,
            )
            self._next_message = now + REPEAT_SECONDS
        time.sleep(seconds)


def lock_holder(handle: int) -> str:
    """Describe the process on this machine that holds a flock on an open file, or return "another process".

    The description says if the process is suspended (SIGSTOP, SLURM gang scheduling), because it then keeps the lock.
    """
    found = os.fstat(handle)
    inode = f":{found.st_ino}"
    device = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}"
    try:
        locks = [line.split() for line in Path("/proc/locks").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return "another process"
    # The second column of /proc/locks is an arrow for waiting processes. On some file systems (btrfs, overlayfs) its
    # device number differs from that of stat, so a unique inode number is accepted without the device number.
    holders = {(line[4], line[5]) for line in locks if line[1] == "FLOCK" and line[5].endswith(inode)}
    exact = {pid for pid, file in holders if file == device + inode}
    pids = exact or {pid for pid, _ in holders}
    return describe_process(int(pids.pop())) if len(pids) == 1 else "another process"


def describe_process(pid: int) -> str:
    """Return a process's pid and program name as text, and whether it is suspended."""
    try:
        name, _, rest = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")
    except OSError:
        return f"process {pid}"
    suspended = ", suspended" if rest.split()[0] in "Tt" else ""
    # A program can set its name to any bytes, such as terminal escape sequences.
    program = "".join(letter if letter.isprintable() else "?" for letter in name.partition("(")[2])
    return f"process {pid} ({program}{suspended})"

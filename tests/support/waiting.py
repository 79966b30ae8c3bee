"""Wait in a test for another thread or process."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path


def wait_until(
    condition: Callable[[], object], what: str = "the condition", seconds: float = 60, *, interval: float = 0.02
) -> None:
    """Wait until the condition is true. The timeout is so long that only a hang exceeds it."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"timed out after {seconds:.0f} s waiting for {what}"
        time.sleep(interval)


def is_running(pid: int) -> bool:
    """Return whether any thread of a process still runs; it may keep files open after the main thread has ended.

    A zombie, whose parent has not waited for it, does not count as running.
    """
    try:
        states = [(task / "status").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    except (FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}").exists()  # a thread ended during the loop
    return not all("\nState:\tZ" in state for state in states)

"""Wait in a test for what another thread or process will do."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path


def wait_until(
    condition: Callable[[], object], what: str = "what was expected", seconds: float = 60, *, interval: float = 0.02
) -> None:
    """Return once the condition holds; fail if it never does, which nothing but a hang takes that long to show."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:.0f} s in vain for {what}"
        time.sleep(interval)


def is_running(pid: int) -> bool:
    """Whether a thread of the process is left, which may hold its files after the main thread has ended.

    One that nobody waits for may stay as a zombie.
    """
    try:
        states = [(task / "status").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    except (FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}").exists()  # of a thread that has ended meanwhile
    return not all("\nState:\tZ" in state for state in states)

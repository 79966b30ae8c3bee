"""Reject sizes that need more memory than the machine has, before any of it is allocated."""

from __future__ import annotations

from pathlib import Path

import psutil

from shards.errors import UserError

GIB = 2**30
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def machine_memory() -> int:
    """Bytes that this process may use at most: the machine's memory, or the limit of its control group (container)."""
    limits = [int(psutil.virtual_memory().total)]
    for file in _CGROUP_LIMITS:
        try:
            text = file.read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit():
            limits.append(int(text))
    return min(limits)


def check_memory(
    what: str, needed: float, remedy: str, *, available: int | None = None, of: str = "this machine"
) -> None:
    """Compare the memory that options need at least with the memory that is available.

    Args:
        what: the options and their values.
        needed: bytes, a lower bound; less than this may still be too little.
        available: bytes; None = this machine's.
        of: what has this memory, for the message.

    Raises:
        UserError: more is needed than is available.
    """
    available = machine_memory() if available is None else available
    if needed > available:
        raise UserError(
            f"{what}: takes {needed / GIB:,.1f} GiB of memory or more, {of} has {available / GIB:,.1f} GiB; {remedy}"
        )

"""Reject options that need more memory than the machine has, before anything is allocated."""

from __future__ import annotations

from pathlib import Path

import psutil

from shards.errors import UserError

GIB = 2**30
_CGROUP_USE = (
    tuple(Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current", "memory.stat")),
    tuple(
        Path("/sys/fs/cgroup/memory") / name
        for name in ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
    ),
)
_CGROUP_LIMITS = tuple(limit for limit, _, _ in _CGROUP_USE)


def machine_memory() -> int:
    """Return the machine's memory, or the limit of the control group (container) if that is smaller, in bytes."""
    limits = [int(psutil.virtual_memory().total)]
    for file in _CGROUP_LIMITS:
        try:
            text = file.read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit():
            limits.append(int(text))
    return min(limits)


def free_memory() -> int:
    """Return the memory that is not in use, on the machine or within the limit of the control group, in bytes.

    The page cache counts as not in use, because the kernel evicts it when memory is needed.
    """
    free = [int(psutil.virtual_memory().available)]
    for limit, used, evictable in _CGROUP_USE:
        try:
            text = [file.read_text(encoding="ascii").strip() for file in (limit, used, evictable)]
        except OSError:
            continue
        if text[0].isdigit() and text[1].isdigit():
            statistics = dict(line.split(maxsplit=1) for line in text[2].splitlines())
            file_pages = sum(int(statistics.get(name, 0)) for name in ("active_file", "inactive_file"))
            free.append(int(text[0]) - int(text[1]) + file_pages)
    return max(min(free), 0)


def check_memory(
    what: str, needed: float, remedy: str, *, available: int | None = None, of: str = "this machine"
) -> None:
    """Raise an error if options need more memory than is available.

    Args:
        what: options and their values, for the message.
        needed: lower bound on the required memory, in bytes.
        remedy: what to change, for the message.
        available: available memory in bytes; None: that of this machine.
        of: owner of the available memory, for the message.

    Raises:
        UserError: more is needed than is available.
    """
    available = machine_memory() if available is None else available
    if needed > available:
        raise UserError(
            f"{what}: needs at least {needed / GIB:,.1f} GiB of memory, but {of} has {available / GIB:,.1f} GiB; "
            f"{remedy}"
        )

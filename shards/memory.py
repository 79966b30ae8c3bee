"""Reject options that need more memory than the machine has, before anything is allocated."""

from __future__ import annotations

from pathlib import Path

import psutil

from shards.errors import UserError

GIB = 2**30
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


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

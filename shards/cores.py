"""How many cores this process may use: its affinity mask, and the CPU quota of its control groups.

A container of `--cpus 2` on a machine of 64 cores sees all 64 (in /proc and in its mask), but the kernel stops it for
the rest of each period once it has used two cores' time. A thread or process per visible core then only makes every
part of the work wait. Every count of threads and processes begins here.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


def cores() -> int:
    """Count the cores that this process may use: the CPUs of its mask, or fewer where its quota pays for fewer."""
    visible = len(os.sched_getaffinity(0))
    paid = quota()
    return visible if paid is None else min(visible, paid)


@functools.cache
def quota() -> int | None:
    """Return the cores that the CPU quota allows, a fraction rounded up; None where there is none. Read once.

    The smallest quota of the process's own control group and of those above it counts. v2: cpu.max ("QUOTA PERIOD" in
    microseconds, or "max PERIOD"); v1: cpu.cfs_quota_us (-1 = none) and cpu.cfs_period_us. Source: the kernel's
    Documentation/admin-guide/cgroup-v2.rst and scheduler/sched-bwc.rst.
    """
    found = [share for folder in _folders() if (share := _share(folder)) is not None]
    return max(1, math.ceil(min(found))) if found else None


def limit_openmp() -> None:
    """Tell OpenMP the quota, which it does not know. Call it before libraries that use OpenMP are imported."""
    if quota() is not None:
        os.environ.setdefault("OMP_NUM_THREADS", str(cores()))


def _folders() -> Iterator[Path]:
    """Folders of the process's control groups and of those above them.

    A container may see its own group as the root, under a path that is the host's: what does not exist is skipped.
    """
    try:
        lines = OWN_GROUPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        lines = []
    own = {"": "/"} | {name: path for _, names, path in (_fields(line) for line in lines) for name in names.split(",")}
    for path, mounts in ((own[""], (".", "unified")), (own.get("cpu", "/"), ("cpu", "cpu,cpuacct"))):
        parts = [part for part in path.split("/") if part]
        for mount in mounts:
            for depth in range(len(parts) + 1):
                yield CGROUPS.joinpath(mount, *parts[:depth])


def _fields(line: str) -> tuple[str, str, str]:
    """Split a line of /proc/self/cgroup: number, controllers (none = v2), path."""
    number, _, rest = line.partition(":")
    names, _, path = rest.partition(":")
    return number, names, path


def _share(folder: Path) -> float | None:
    """Return the cores' worth of time of one group; None where it has no quota of its own."""
    allowed, period = "", ""
    try:
        allowed, period = (folder / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            allowed = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
        except (OSError, ValueError):
            return None
    if not (allowed.isdecimal() and period.isdecimal() and int(allowed) and int(period)):
        return None  # "max", or -1
    return int(allowed) / int(period)

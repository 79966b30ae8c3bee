"""Count the cores that this process may use, from its affinity mask and the CPU quota of its control groups.

A container with `--cpus 2` on a machine with 64 cores sees all 64 in /proc and in its mask, but the kernel throttles it
for the rest of each period after two cores' worth of CPU time. One thread per visible core would then slow everything
down. All default numbers of threads and processes are derived from `cores()`.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

CGROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


def cores() -> int:
    """Return the number of cores in the affinity mask, or of the CPU quota if that is smaller."""
    visible = len(os.sched_getaffinity(0))
    allowed = quota()
    return visible if allowed is None else min(visible, allowed)


@functools.cache
def quota() -> int | None:
    """Return the CPU quota in cores, rounded up; None if there is no quota. Read only once.

    This is the smallest quota of the process's control group and its ancestors. cgroup v2: cpu.max ("QUOTA PERIOD" in
    microseconds, or "max PERIOD"); v1: cpu.cfs_quota_us (-1: no quota) and cpu.cfs_period_us. Source: the kernel's
    Documentation/admin-guide/cgroup-v2.rst and scheduler/sched-bwc.rst.
    """
    found = [cpus for folder in control_groups() if (cpus := _quota_of(folder)) is not None]
    return max(1, math.ceil(min(found))) if found else None


class QuotaPeriods(NamedTuple):
    """Periods of a CPU quota in which processes of its control group ran, and those in which it stopped them."""

    periods: int
    throttled: int


def quota_periods() -> QuotaPeriods | None:
    """Return the periods of the smallest CPU quota since the control group exists; None if there is no quota."""
    limited = [(cpus, folder) for folder in control_groups() if (cpus := _quota_of(folder)) is not None]
    if not limited:
        return None
    try:
        counts = cpu_counters(min(limited)[1])
        return QuotaPeriods(counts["nr_periods"], counts["nr_throttled"])
    except (OSError, ValueError, KeyError):
        return None


def cpu_counters(group: Path) -> dict[str, int]:
    """Return the counters in cpu.stat of a control group.

    Raises:
        OSError: there is no such file.
        ValueError: it has another form.
    """
    lines = (group / "cpu.stat").read_text(encoding="ascii").splitlines()
    return {name: int(value) for name, value in (line.split() for line in lines)}


def limit_openmp() -> None:
    """Limit OpenMP to the CPU quota, which OpenMP does not detect. Call this before importing libraries that use it."""
    if quota() is not None:
        os.environ.setdefault("OMP_NUM_THREADS", str(cores()))


def control_groups() -> Iterator[Path]:
    """Yield the folders of the process's control groups and of their ancestors.

    In a container, /proc may list a path of the host that does not exist; the caller skips such folders.
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
    """Split a line of /proc/self/cgroup into number, controllers (empty for cgroup v2) and path."""
    number, _, rest = line.partition(":")
    names, _, path = rest.partition(":")
    return number, names, path


def _quota_of(folder: Path) -> float | None:
    """Return the quota of one control group in cores; None if it has no quota."""
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
        return None  # "max" or -1: no quota
    return int(allowed) / int(period)

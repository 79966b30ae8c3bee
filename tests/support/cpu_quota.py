"""Control groups that limit CPUs."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

PERIOD = 100_000  # microseconds
GROUPS = Path("/sys/fs/cgroup")


@contextlib.contextmanager
def cpu_quota(cores: float, *, period: int = PERIOD) -> Iterator[Path]:
    """Create a control group with a quota; yield the file to which a process writes its id to join it.

    With a short `period`, in microseconds, processes that exchange messages wait less for each other.

    Skips the test if this machine does not allow it; fails instead if CI=true.
    """
    quota = str(int(cores * period))
    with _group(
        "cpu", {"cpu.cfs_period_us": str(period), "cpu.cfs_quota_us": quota}, {"cpu.max": f"{quota} {period}"}
    ) as processes:
        yield processes


def change_quota(processes: Path, cores: float, *, period: int = PERIOD) -> None:
    """Change the quota of a group of `cpu_quota` that has the same period."""
    quota, file = str(int(cores * period)), processes.with_name("cpu.cfs_quota_us")
    if file.exists():
        file.write_text(quota)
    else:
        processes.with_name("cpu.max").write_text(f"{quota} {period}")


@contextlib.contextmanager
def cpu_set(cpus: str) -> Iterator[Path]:
    """Create a control group with a set of logical CPUs, such as "0-3"; otherwise like `cpu_quota`."""
    with _group("cpuset", {"cpuset.cpus": cpus, "cpuset.mems": "0"}, {"cpuset.cpus": cpus}) as processes:
        yield processes


@contextlib.contextmanager
def _group(controller: str, version1: dict[str, str], version2: dict[str, str]) -> Iterator[Path]:
    old = (GROUPS / controller).is_dir()
    group = (GROUPS / controller if old else GROUPS) / f"test-{os.getpid()}-{time.monotonic_ns()}"
    try:
        group.mkdir()
        if not old:
            (GROUPS / "cgroup.subtree_control").write_text(f"+{controller}")
        for name, value in (version1 if old else version2).items():
            (group / name).write_text(value)
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        reason = f"needs the right to create control groups that limit CPUs ({error})"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    try:
        yield group / "cgroup.procs"
    finally:
        end = time.monotonic() + 20
        while time.monotonic() < end:
            try:
                group.rmdir()
                break
            except OSError:  # its processes have not ended yet
                time.sleep(0.1)


def joined(processes: Path) -> tuple[str, ...]:
    """Return the beginning of a command line that runs a program in a control group of this module."""
    return ("sh", "-c", f'echo $$ > {processes} && exec "$@"', "quota")

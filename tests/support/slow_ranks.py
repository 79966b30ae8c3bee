"""Slow a running process down in different ways."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

GROUPS = Path("/sys/fs/cgroup")
PERIOD = 100_000  # microseconds


@contextlib.contextmanager
def stop_pulses(pid: int, *, seconds: float = 0.1) -> Iterator[None]:
    """Stop a process for `seconds` again and again, half of the time."""
    ends = threading.Event()

    def pulse() -> None:
        while not ends.wait(seconds):
            os.kill(pid, signal.SIGSTOP)
            ends.wait(seconds)
            os.kill(pid, signal.SIGCONT)

    thread = threading.Thread(target=pulse)
    thread.start()
    try:
        yield
    finally:
        ends.set()
        thread.join()


def bind(pid: int, core: int) -> None:
    """Bind all threads of a process to a core."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(task.name), {core})


@contextlib.contextmanager
def busy_core(pid: int, core: int) -> Iterator[None]:
    """Keep the core of a process, which has been bound to it, busy with other processes that have a higher priority.

    With equal priorities, the kernel would move all other processes of the machine to the other cores, until those are
    as busy.
    """
    tasks = [int(task.name) for task in Path(f"/proc/{pid}/task").iterdir()]
    _set_niceness(tasks, 6)
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    for process in spinning:
        os.sched_setaffinity(process.pid, {core})
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()
        with contextlib.suppress(PermissionError):  # only root may raise a priority
            _set_niceness(tasks, 0)


def _set_niceness(tasks: list[int], niceness: int) -> None:
    for task in tasks:
        with contextlib.suppress(ProcessLookupError):  # the thread has ended
            os.setpriority(os.PRIO_PROCESS, task, niceness)


@contextlib.contextmanager
def cpu_quota(pid: int, cores: float) -> Iterator[None]:
    """Limit a process to a number of cores with a control group. Skip the test where that is not possible."""
    version1 = (GROUPS / "cpu" / "cgroup.procs").exists()
    parent = GROUPS / "cpu" if version1 else GROUPS
    group = parent / f"slow-rank-{pid}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"needs the right to create control groups ({error})")
    try:
        if version1:
            (group / "cpu.cfs_period_us").write_text(str(PERIOD))
            (group / "cpu.cfs_quota_us").write_text(str(int(cores * PERIOD)))
        elif (group / "cpu.max").exists():
            (group / "cpu.max").write_text(f"{int(cores * PERIOD)} {PERIOD}")
        else:
            pytest.skip("the CPU controller of control groups is not enabled")
        (group / "cgroup.procs").write_text(str(pid))
        yield
    finally:
        with contextlib.suppress(OSError):  # the process has already ended
            (parent / "cgroup.procs").write_text(str(pid))
        with contextlib.suppress(OSError):
            group.rmdir()

"""Kill all processes that `benchmarks/gpu.py` has started when it ends, even by SIGKILL.

    python benchmarks/gpu_run/watchdog.py MARK

The script starts this program in a new session, with a pipe as its standard input. Only the script holds the write end,
so the pipe is closed when the script ends. Then every process whose environment variable FAT_GPU_MARK begins with MARK
is killed: it would otherwise keep the GPU busy during the next run.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

MARK = "FAT_GPU_MARK"
WAIT = 0.1  # seconds between attempts to kill all processes
ATTEMPTS = 100  # enough to kill a process in a call of the GPU driver, which ends only after the call


def main() -> None:
    sys.stdin.buffer.read()
    time.sleep(WAIT)  # a process that the script has just started needs this time until its mark can be read
    end_all(sys.argv[1])


def end_all(mark: str) -> None:
    """Kill all processes with this mark, in any session, and their descendants."""
    for _ in range(ATTEMPTS):
        found = processes_of(mark)
        if not found:
            return
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(WAIT)


def processes_of(mark: str) -> list[psutil.Process]:
    """Return running processes whose mark begins with `mark`, and their descendants, without the calling process."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):  # the process has ended, or belongs to another user
            if process.environ().get(MARK, "").startswith(mark):
                family = [process, *process.children(recursive=True)]
                found |= {member.pid: member for member in family if alive(member)}
    found.pop(os.getpid(), None)
    return list(found.values())


def alive(process: psutil.Process) -> bool:
    """Return whether a process still runs. A killed process is a zombie until its parent reads its status."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@contextmanager
def kill_on_exit(mark: str) -> Iterator[None]:
    """Kill all processes with this mark when the block ends, or when this process is killed inside it."""
    command = [sys.executable, os.path.abspath(__file__), mark]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True):
        yield  # Popen.__exit__ then closes the pipe and waits for the watchdog


if __name__ == "__main__":
    main()

"""End what `benchmarks/gpu.py` has started when it has ended, however it was ended.

    python benchmarks/gpu_run/watchdog.py MARK

The script starts this program in a session of its own, with a pipe as its standard input. Only the script holds the
other end, so the pipe closes when the script ends, even by SIGKILL. Then every process whose environment has a
FAT_GPU_MARK that begins with MARK is killed: it would otherwise keep the GPU busy during the next call.
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
WAIT = 0.1  # seconds until killed processes are looked for again
ATTEMPTS = 100  # a process that is in a call of the GPU's driver ends late


def main() -> None:
    sys.stdin.buffer.read()
    time.sleep(WAIT)  # what the script was starting at that moment has its mark by then
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
    """Running processes whose mark begins like this and their descendants, without the caller."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):  # it has ended meanwhile, or belongs to somebody else
            if process.environ().get(MARK, "").startswith(mark):
                family = [process, *process.children(recursive=True)]
                found |= {member.pid: member for member in family if alive(member)}
    found.pop(os.getpid(), None)
    return list(found.values())


def alive(process: psutil.Process) -> bool:
    """Whether it still runs: one that has been killed is a zombie until its parent asks for its status."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@contextmanager
def watched(mark: str) -> Iterator[None]:
    """End all processes with this mark when the block ends, or when this process is killed in it."""
    command = [sys.executable, os.path.abspath(__file__), mark]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True):
        yield  # after it the pipe is closed, and the watchdog waited for


if __name__ == "__main__":
    main()

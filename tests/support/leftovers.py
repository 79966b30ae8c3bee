"""What a piece of code leaves behind in this process and on this machine."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path


def children() -> set[int]:
    """Process ids of this process's children."""
    return {int(pid) for task in Path("/proc/self/task").glob("*/children") for pid in task.read_text().split()}


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def feed_buffers(process: int | str = "self") -> int:
    """How many of a feed process's buffers a process has mapped."""
    return Path(f"/proc/{process}/maps").read_text().count("memfd:encoded-images")


@contextlib.contextmanager
def nothing_is_left_behind() -> Iterator[None]:
    """No thread, file, shared memory or child process that was not there before.

    Run the code once before: libraries keep threads and files from their first use on. What other tests left may go
    meanwhile, so only additions count.
    """
    gc.collect()  # mapped buffers have file descriptors, and reference cycles may hold them for a while
    threads, processes, shared = set(threading.enumerate()), children(), set(os.listdir("/dev/shm"))
    files, buffers = open_files(), feed_buffers()
    yield
    gc.collect()
    assert not set(threading.enumerate()) - threads
    assert not children() - processes
    assert not set(os.listdir("/dev/shm")) - shared
    assert open_files() <= files
    assert feed_buffers() <= buffers

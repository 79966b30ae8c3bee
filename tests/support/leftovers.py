"""Check that code leaves no threads, files, shared memory or processes behind."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path


def children() -> set[int]:
    """Return the pids of this process's children."""
    return {int(pid) for task in Path("/proc/self/task").glob("*/children") for pid in task.read_text().split()}


def open_files() -> int:
    """Return the number of open file descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))


def feed_buffers(process: int | str = "self") -> int:
    """Return how many buffers of a feed process are mapped into a process."""
    return Path(f"/proc/{process}/maps").read_text().count("memfd:encoded-images")


@contextlib.contextmanager
def nothing_is_left_behind() -> Iterator[None]:
    """Assert that the block adds no thread, open file, shared memory or child process.

    Run the code once before, because libraries keep threads and files after their first use. Only additions count,
    because leftovers of other tests may disappear during the block.
    """
    gc.collect()  # reference cycles may keep mapped buffers, and thus file descriptors, alive
    threads, processes, shared = set(threading.enumerate()), children(), set(os.listdir("/dev/shm"))
    files, buffers = open_files(), feed_buffers()
    yield
    gc.collect()
    assert not set(threading.enumerate()) - threads
    assert not children() - processes
    assert not set(os.listdir("/dev/shm")) - shared
    assert open_files() <= files
    assert feed_buffers() <= buffers

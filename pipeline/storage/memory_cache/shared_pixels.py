"""Memory that holds the pixels of a `CacheLayout`, shared by the processes of a node.

It is an anonymous file (memfd). It has no name in any file system, does not depend on the size of /dev/shm, and the
kernel frees it when the last process that has it open or mapped ends, whatever ends it. Other processes of the same
user open it as /proc/PID/fd/N.

The first bytes are flags, one per sample: 1 once all of the sample's pixels are stored. A sample is decoded by the
process that needs it first. If two processes store it at the same time, they write the same bytes.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading

import numpy as np
from numpy.typing import NDArray

from pipeline.plan import Ids
from pipeline.storage.memory_cache.layout import CacheLayout
from shards.errors import UserError

# From linux/fcntl.h; Python's fcntl module has them only from version 3.13 on.
_F_ADD_SEALS = 1033
_SEALS = 0x1 | 0x2 | 0x4  # no more seals, no shrinking, no growing


def allocate(size: int) -> int:
    """Create memory of `size` zero bytes, and return its file descriptor. Memory is used only as it is written."""
    handle = os.memfd_create("decoded-images", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(handle, size)
    fcntl.fcntl(handle, _F_ADD_SEALS, _SEALS)  # truncation by another process would be SIGBUS in this one
    return handle


def open_shared(path: str) -> int:
    """Open the memory of another process by its `SharedPixels.path`, and return a file descriptor.

    Raises:
        UserError: the process has ended, or this process may not access its memory.
    """
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise UserError(
            f"--memory-cache: cannot open {path}, the memory of another process ({error.strerror}); all processes of a "
            "machine must run as the same user and in the same container; otherwise use --memory-cache 0"
        ) from error


class StoredFlags:
    """Tells which samples are stored. It maps only the flags, for processes that read samples but do not decode them.

    Args:
        path: `SharedPixels.path` of another process, or of this one.
        samples: number of samples of the split.
    """

    def __init__(self, path: str, samples: int) -> None:
        handle = open_shared(path)
        try:
            self._flags = np.frombuffer(mmap.mmap(handle, samples, prot=mmap.PROT_READ), np.uint8)
        finally:
            os.close(handle)
        self._lock = threading.Lock()

    def stored(self, ids: Ids) -> NDArray[np.bool_]:
        """Return which samples are stored, bool [n]."""
        found: NDArray[np.bool_] = self._flags[ids] == 1
        _memory_barrier(self._lock)
        return found


class SharedPixels:
    """The pixels of the samples that the cache keeps. Thread-safe.

    Args:
        layout: the samples, the same in all processes.
        handle: file descriptor of memory of `layout.size` bytes, which this object closes.
    """

    def __init__(self, layout: CacheLayout, handle: int) -> None:
        self.layout, self._handle = layout, handle
        self._memory = np.frombuffer(mmap.mmap(handle, layout.size), np.uint8)
        self._lock = threading.Lock()

    @property
    def path(self) -> str:
        """Path by which processes of the same user can open the memory while this object is not closed."""
        return f"/proc/{os.getpid()}/fd/{self._handle}"

    def stored(self, sample: int) -> bool:
        """Return whether a sample is stored."""
        found = bool(self._memory[sample] == 1)
        _memory_barrier(self._lock)
        return found

    def pixels(self, sample: int) -> NDArray[np.uint8]:
        """Return a view of the pixels of a sample that is stored, uint8 [height x width x 3]."""
        start = int(self.layout.offsets[sample])
        return self._memory[start : start + 3 * int(self.layout.heights[sample] * self.layout.widths[sample])]

    def store(self, sample: int, pixels: NDArray[np.uint8]) -> None:
        """Store the pixels of a sample that the cache keeps, uint8 of any shape."""
        self.pixels(sample)[:] = pixels.reshape(-1)
        _memory_barrier(self._lock)
        self._memory[sample] = 1

    def used(self) -> tuple[int, int]:
        """Return how many samples are stored by all processes, and their bytes."""
        stored = np.flatnonzero(self._memory[: len(self.layout.offsets)])
        sizes = 3 * self.layout.heights[stored] * self.layout.widths[stored]
        return len(stored), int(sizes.sum())

    def close(self) -> None:
        """Close the file. The memory is freed when no process has it open and no view of it is in use."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
            del self._memory


def _memory_barrier(lock: threading.Lock) -> None:
    """Order the accesses to shared memory before and after this call.

    A processor with a weak memory model (ARM) may otherwise make a flag visible before the pixels that it stands for,
    or read pixels before their flag. Python has no barriers, but its locks contain them: nothing moves from before the
    first release to after it, or from after the second acquisition to before it.
    """
    for _ in range(2):
        with lock:
            pass

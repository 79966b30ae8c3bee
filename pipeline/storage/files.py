"""Read access to the files of a split, with a bounded number of open file descriptors."""

from __future__ import annotations

import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.plan import ShardRequest
from shards.errors import ShardSetError, storage_error
from shards.files.retry import read_with_retries
from shards.open_files import open_file_budget

MAX_OPEN = 256


class Interrupted(Exception):
    """A read was interrupted because the reader is being closed."""


class ShardFiles(Protocol):
    """The files from which a `SampleReader` reads. Thread-safe."""

    def read(self, file: int, target: NDArray[np.uint8], offset: int) -> None:
        """Fill `target` (uint8 [n]) with the bytes at `offset` of file number `file`.

        Raises:
            ShardSetError: the file is missing or too short.
            StorageFailed: the file cannot be read.
            Interrupted: `interrupt` was called.
        """
        ...

    def random_access(self) -> bool:
        """Return whether any range of a file can be read without the rest of the file."""
        ...

    def read_if_cached(self, file: int, target: NDArray[np.uint8], offset: int) -> bool:
        """Fill `target` like `read`, but only if that does not block (bytes in the page cache).

        Returns:
            Whether `target` was filled.
        """
        ...

    def prefetch(self, requests: Iterator[ShardRequest]) -> None:
        """Start to fetch the requested shards, in the order in which they will be read."""
        ...

    def advance(self, step: int) -> None:
        """Mark all batches before `step` as read."""
        ...

    def name(self, file: int) -> str:
        """Return the path or URL of a file, for messages."""
        ...

    def interrupt(self) -> None:
        """Make waiting reads and all later reads raise `Interrupted`."""
        ...

    def close(self) -> None:
        """Release all resources. Nothing may be read after this call."""
        ...


class LocalFiles:
    """Files on local or mounted file systems. Beyond `max_open` files, the one that was opened first is closed.

    Files are not memory-mapped: truncation of a mapped file raises SIGBUS, page faults are slow on network file
    systems, and thousands of shards exceed the limit of mappings.

    Args:
        max_open: maximum number of open descriptors. None: `MAX_OPEN`, or fewer if the process's limit is lower.
    """

    def __init__(self, paths: Sequence[Path], *, max_open: int | None = None) -> None:
        self._paths = paths
        self._limit = open_file_budget(MAX_OPEN) if max_open is None else max_open
        self._lock = threading.Lock()
        self._open: OrderedDict[int, _Handle] = OrderedDict()
        self._interrupted = False

    def read(self, file: int, target: NDArray[np.uint8], offset: int) -> None:
        read_with_retries(
            self._paths[file],
            lambda: self._read_once(file, target, offset),
            remedy="copy the file again, or run 'pipeline verify' on the set",
        )

    def random_access(self) -> bool:
        return True

    def read_if_cached(self, file: int, target: NDArray[np.uint8], offset: int) -> bool:
        handle = self._open.get(file)
        return handle is not None and read_cached(handle.number, target, offset)

    def prefetch(self, requests: Iterator[ShardRequest]) -> None:
        """Do nothing: the files are local."""

    def advance(self, step: int) -> None:
        """Do nothing: `_add` closes files when too many are open."""

    def name(self, file: int) -> str:
        return str(self._paths[file])

    @property
    def open_count(self) -> int:
        """Number of open descriptors."""
        return len(self._open)

    def interrupt(self) -> None:
        self._interrupted = True

    def close(self) -> None:
        with self._lock:
            self._open.clear()

    def _read_once(self, file: int, target: NDArray[np.uint8], offset: int) -> None:
        if self._interrupted:
            raise Interrupted
        # A reader holds a reference: a handle removed from `_open` is closed when its last reader is done.
        handle = self._open.get(file) or self._add(file)
        try:
            _fill(handle.number, target, offset, self._paths[file])
        except OSError:
            with self._lock:
                if self._open.get(file) is handle:
                    del self._open[file]
            raise

    def _add(self, file: int) -> _Handle:
        # Open without holding the lock: on a network file system this is slow, and other threads would wait.
        # Without O_NONBLOCK, opening a named pipe would wait for a writer.
        try:
            opened = _Handle(os.open(self._paths[file], os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._lower_limit()
            raise
        # On Lustre, a non-blocking read fails while another host holds a lock. (Reading a pipe at an offset fails.)
        os.set_blocking(opened.number, True)
        with self._lock:
            handle = self._open.setdefault(file, opened)
            while len(self._open) > self._limit:
                self._open.popitem(last=False)
        return handle

    def _lower_limit(self) -> None:
        """Close half of the files and lower the limit: other parts of the process need descriptors too."""
        with self._lock:
            self._limit = max(1, min(self._limit, len(self._open)) // 2)
            while len(self._open) > self._limit:
                self._open.popitem(last=False)


class _Handle:
    """A file descriptor that is closed when its last reference is gone."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


def read_cached(handle: int, target: NDArray[np.uint8], offset: int) -> bool:
    """Fill `target` if the bytes are in the page cache; return False if they are not or this is unknown (NFS)."""
    try:
        return os.preadv(handle, [target], offset, os.RWF_NOWAIT) == len(target)  # type: ignore[list-item]
    except OSError:
        return False


def read_fully(handle: int, target: NDArray[np.uint8], offset: int, path: Path) -> None:
    """Fill `target` with the bytes at `offset` of an open file.

    Raises:
        ShardSetError: the file is too short.
        StorageFailed: the file cannot be read.
    """
    try:
        _fill(handle, target, offset, path)
    except OSError as error:
        raise storage_error(path, error) from error


def _fill(handle: int, target: NDArray[np.uint8], offset: int, path: Path) -> None:
    """Fill `target` with the bytes at `offset`, in a loop because preadv may return fewer bytes than requested."""
    done = 0
    while done < len(target):
        got = os.preadv(handle, [target.data[done:]], offset + done)
        if got == 0:
            raise ShardSetError(
                f"{path}: truncated: the file ends at byte {offset + done}, inside a sample of {len(target)} bytes at "
                f"offset {offset}; copy the shard again"
            )
        done += got

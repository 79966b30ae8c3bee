"""The files of a split, opened for reading: a bounded number of descriptors, however many shards there are."""

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
    """The reader is being closed."""


class ShardFiles(Protocol):
    """Where a reader gets bytes from. Thread-safe."""

    def read(self, file: int, target: NDArray[np.uint8], offset: int) -> None:
        """Fill `target` (uint8 [n]) from file number `file`.

        Raises:
            ShardSetError: the file is missing or too short.
            StorageFailed: it cannot be read.
            Interrupted: `interrupt` was called.
        """
        ...

    def random_access(self) -> bool:
        """Return whether a few bytes anywhere in a file can be read without the rest of it."""
        ...

    def read_if_cached(self, file: int, target: NDArray[np.uint8], offset: int) -> bool:
        """The same if it takes no waiting, as when the bytes are in the page cache; False otherwise."""
        ...

    def prefetch(self, requests: Iterator[ShardRequest]) -> None:
        """What will be read, file by file in order, to be fetched before it is."""
        ...

    def advance(self, step: int) -> None:
        """All batches before `step` have been read."""
        ...

    def name(self, file: int) -> str:
        """The file, for messages."""
        ...

    def interrupt(self) -> None:
        """Let reads that wait for something, and all later ones, end at once."""
        ...

    def close(self) -> None:
        """Give everything back; nobody reads any more."""
        ...


class LocalFiles:
    """Files of this machine's file systems; when too many are open, the one that was opened first is closed.

    No memory maps: a map whose file is truncated is a SIGBUS, network file systems punish page faults, and thousands of
    shards exhaust them.

    Args:
        max_open: descriptors to hold; None = `MAX_OPEN`, or fewer under a low limit of open files.
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
            remedy="copy it again, or run 'pipeline verify' on the set",
        )

    def random_access(self) -> bool:
        return True

    def read_if_cached(self, file: int, target: NDArray[np.uint8], offset: int) -> bool:
        handle = self._open.get(file)
        return handle is not None and read_cached(handle.number, target, offset)

    def prefetch(self, requests: Iterator[ShardRequest]) -> None:
        """It is here already."""

    def advance(self, step: int) -> None:
        """Files are closed when others are opened."""

    def name(self, file: int) -> str:
        return str(self._paths[file])

    @property
    def open_count(self) -> int:
        """Descriptors held."""
        return len(self._open)

    def interrupt(self) -> None:
        self._interrupted = True

    def close(self) -> None:
        with self._lock:
            self._open.clear()

    def _read_once(self, file: int, target: NDArray[np.uint8], offset: int) -> None:
        if self._interrupted:
            raise Interrupted
        # Readers hold a reference: an evicted handle is closed when its last reader is done.
        handle = self._open.get(file) or self._add(file)
        try:
            _fill(handle.number, target, offset, self._paths[file])
        except OSError:
            with self._lock:
                if self._open.get(file) is handle:
                    del self._open[file]
            raise

    def _add(self, file: int) -> _Handle:
        # Opened outside of the lock: on a network file system that takes a while, and others need not wait for it.
        # Without O_NONBLOCK, opening a named pipe would wait for a writer.
        try:
            opened = _Handle(os.open(self._paths[file], os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._hold_fewer()
            raise
        # Lustre fails reads that would wait for a lock of another host. A pipe cannot be read at an offset anyway.
        os.set_blocking(opened.number, True)
        with self._lock:
            handle = self._open.setdefault(file, opened)
            while len(self._open) > self._limit:
                self._open.popitem(last=False)
        return handle

    def _hold_fewer(self) -> None:
        """Close half of the files, and keep no more from now on: other parts of the process need descriptors too."""
        with self._lock:
            self._limit = max(1, min(self._limit, len(self._open)) // 2)
            while len(self._open) > self._limit:
                self._open.popitem(last=False)


class _Handle:
    """A file descriptor that closes itself."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


def read_cached(handle: int, target: NDArray[np.uint8], offset: int) -> bool:
    """Fill `target` if the bytes are in the page cache; False where they are not, or where nobody can tell (NFS)."""
    try:
        return os.preadv(handle, [target], offset, os.RWF_NOWAIT) == len(target)  # type: ignore[list-item]
    except OSError:
        return False


def read_fully(handle: int, target: NDArray[np.uint8], offset: int, path: Path) -> None:
    """Fill `target` from `offset` of an open file.

    Raises:
        ShardSetError: the file ends before.
        StorageFailed: it cannot be read.
    """
    try:
        _fill(handle, target, offset, path)
    except OSError as error:
        raise storage_error(path, error) from error


def _fill(handle: int, target: NDArray[np.uint8], offset: int, path: Path) -> None:
    """Fill `target` from `offset`; preadv may deliver less than asked for."""
    done = 0
    while done < len(target):
        got = os.preadv(handle, [target.data[done:]], offset + done)
        if got == 0:
            raise ShardSetError(
                f"{path}: ends at byte {offset + done}, inside a sample of {len(target)} bytes at {offset}: truncated; "
                "copy the shard again"
            )
        done += got

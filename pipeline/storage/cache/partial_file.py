"""A file of the cache during its download."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipeline.storage.cache.errors import cache_errors
from pipeline.storage.cache.record import Entry
from shards.files.waiting import lock_holder


@dataclass(frozen=True)
class Busy:
    """Another process downloads the file, or has just completed it."""

    path: Path
    """Path of the complete file."""
    done: int
    """Bytes downloaded so far."""
    part: Path | None = None
    """Path of the partial file; None: the file is complete."""

    def holder(self) -> str:
        """Describe the downloading process (see `lock_holder`). Takes milliseconds if the machine has many locks."""
        with contextlib.suppress(OSError):
            if self.part is not None:
                handle = os.open(self.part, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
                try:
                    return lock_holder(handle)
                finally:
                    os.close(handle)
        return "another process"


class _Cache(Protocol):
    """The methods of the cache that a partial file uses."""

    @property
    def parent(self) -> Path: ...

    def publish(self, part: PartialFile) -> int: ...

    def remove_part(self, part: PartialFile) -> None: ...


class PartialFile:
    """A partial file that this process downloads. It holds the exclusive lock on the file until it is closed."""

    def __init__(
        self, cache: _Cache, handle: int, path: Path, entry: Entry, check_interrupt: Callable[[], None]
    ) -> None:
        self._cache, self.handle, self.path, self.entry = cache, handle, path, entry
        self.check_interrupt = check_interrupt
        self.done = min(os.fstat(handle).st_size, entry.size)
        """Current size in bytes."""

    def read(self, start: int, stop: int) -> bytes:
        return os.pread(self.handle, stop - start, start)

    def append(self, content: bytes) -> None:
        """Append bytes.

        Raises:
            DiskFull: the disk is full; the partial file was removed to free space for other programs.
            StorageFailed: the disk failed for another reason.
        """
        view = memoryview(content)
        with cache_errors(self._cache.parent, self.discard):
            while view:
                written = os.pwrite(self.handle, view, self.done)
                self.done, view = self.done + written, view[written:]

    def restart(self) -> None:
        """Truncate the file to zero bytes."""
        with cache_errors(self._cache.parent, self.discard):
            os.ftruncate(self.handle, 0)
        self.done = 0

    def finish(self) -> int:
        """Publish the complete file under its final name; return a lease of it.

        Raises:
            PartRemoved: another program removed the partial file.
            ForeignFile: a file with the final name exists.
            UserError: see `append`.
        """
        with cache_errors(self._cache.parent, self.discard):
            os.ftruncate(self.handle, self.done)
            os.fsync(self.handle)
            return self._cache.publish(self)

    def discard(self) -> None:
        """Remove the partial file."""
        self._cache.remove_part(self)

    def __enter__(self) -> PartialFile:
        return self

    def __exit__(self, *_: object) -> None:
        """Release the lock; if the file is not complete, another process may resume the download."""
        os.close(self.handle)

"""A file of the cache while it is fetched."""

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
    """Another process fetches the file, or has just finished it."""

    path: Path
    """Path of the file."""
    done: int
    """Bytes fetched so far."""
    part: Path | None = None
    """The partial file; None = the file is complete."""

    def holder(self) -> str:
        """Describe the process (see `lock_holder`). Takes milliseconds where many locks are held on the machine."""
        with contextlib.suppress(OSError):
            if self.part is not None:
                handle = os.open(self.part, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
                try:
                    return lock_holder(handle)
                finally:
                    os.close(handle)
        return "another process"


class _Cache(Protocol):
    """What a part asks of its cache."""

    @property
    def place(self) -> Path: ...

    def publish(self, part: PartialFile) -> int: ...

    def remove_part(self, part: PartialFile) -> None: ...


class PartialFile:
    """What there is so far of a file that this process fetches."""

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
        """Add to the end.

        Raises:
            DiskFull: the disk is full; what was there is removed, as it may be in others' way.
            StorageFailed: the disk failed otherwise.
        """
        view = memoryview(content)
        with cache_errors(self._cache.place, self.discard):
            while view:
                written = os.pwrite(self.handle, view, self.done)
                self.done, view = self.done + written, view[written:]

    def restart(self) -> None:
        """Throw away what is there."""
        with cache_errors(self._cache.place, self.discard):
            os.ftruncate(self.handle, 0)
        self.done = 0

    def finish(self) -> int:
        """Publish the whole file under its name; returns a lease of it.

        Raises:
            PartRemoved: the part was removed.
            ForeignFile: its name is taken.
            UserError: what `append` raises.
        """
        with cache_errors(self._cache.place, self.discard):
            os.ftruncate(self.handle, self.done)
            os.fsync(self.handle)
            return self._cache.publish(self)

    def discard(self) -> None:
        """Remove the part."""
        self._cache.remove_part(self)

    def __enter__(self) -> PartialFile:
        return self

    def __exit__(self, *_: object) -> None:
        """Release the part; if it is not finished, another process may resume it."""
        os.close(self.handle)

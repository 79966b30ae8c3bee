"""A bounded folder of fetched files that the processes of a node share; what was not used for longest goes first.

All coordination is by the kernel's file locks, which go when their holder dies, however it dies:

- who uses a file holds a shared lock on it (a *lease*), and nobody removes it;
- who fetches a file holds an exclusive lock on the part that is there so far (NAME.SIZE.part), which counts as if it
  were whole already; the part of a process that died is gone on with by the next one;
- room is made under one lock of the folder, so that the bound holds for all processes together.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from shards.errors import StorageFailed, UserError

PART = ".part"
LOCK = ".lock"
# Of what is free on the file system (or taken by the cache already), when no bound is given.
DEFAULT_SHARE = 0.8
# EFBIG is what a limit on the size of files says.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CacheFull(UserError):
    """All of the cache's room is in use, or too small altogether."""


class DiskFull(CacheFull):
    """The disk that the cache is on is full, whatever the cache may hold."""

    exit_code = 1

    @classmethod
    def of(cls, folder: Path, reason: str) -> DiskFull:
        return cls(f"--cache {folder}: {reason}; free some space there, or give another folder")


@dataclass(frozen=True)
class _Entry:
    path: Path
    size: int
    """Counted: the final size of a part."""
    stored: int
    """Bytes that are there."""
    used: int
    """When it was last used, in nanoseconds."""


class Cache:
    """The folder.

    Args:
        folder: made where it does not exist; should be on a local disk of the node.
        limit: bytes that all files together may take; None = four fifths of what is free there.

    Raises:
        UserError: the folder cannot be made or written to.
        DiskFull: there is not even room for its lock.
    """

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(folder / LOCK)
            with self._lock:
                used = sum(entry.size for entry in self._entries())
        except OSError as error:
            if error.errno in _FULL:
                raise _failed(folder, error) from error
            raise UserError(f"--cache {folder}: cannot be used ({error.strerror}); give another folder") from error
        self.limit = int((shutil.disk_usage(folder).free + used) * DEFAULT_SHARE) if limit is None else limit

    def __reduce__(self) -> tuple[type[Cache], tuple[Path, int]]:
        """Another process has a lock of its own on the same folder."""
        return Cache, (self.folder, self.limit)

    def lease(self, path: Path, size: int) -> int | None:
        """A descriptor of a finished file, which stays there while it is open; None if there is no such file.

        Args:
            size: that it must have.
        """
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            found = os.fstat(handle)
            if found.st_nlink and found.st_size == size:
                with contextlib.suppress(PermissionError):  # another user's
                    os.utime(handle)
                return handle
        except BlockingIOError:  # about to be removed
            pass
        os.close(handle)
        return None

    def begin(self, path: Path, size: int) -> Part | None:
        """Become the one process that fetches a file; None where another one does.

        Raises:
            CacheFull: there is no room, and nothing that is not in use.
            StorageFailed: the disk failed otherwise.
        """
        part = path.with_name(f"{path.name}.{size}{PART}")
        try:
            with self._lock:
                if not part.exists():
                    self._make_room(size, path)
                path.parent.mkdir(exist_ok=True)
                handle = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            if _locked(handle, part):
                return Part(handle, part, path, size)
        except OSError as error:
            raise _failed(self.folder, error) from error
        os.close(handle)
        return None

    def _make_room(self, size: int, path: Path) -> None:
        """Remove files, the one not used for longest first, until `size` bytes fit; none if they cannot be made to."""
        if size > self.limit:
            raise CacheFull(
                f"--cache {self.folder}: {path.name} has {size:,} bytes, more than the {self.limit:,} that the "
                "cache may hold; give a larger --cache-size"
            )
        entries = sorted(self._entries(), key=lambda entry: entry.used)
        over = sum(entry.size for entry in entries) + size - self.limit
        # Others write to the disk too; what parts still lack of their size is spoken for.
        lacking = size + sum(entry.size - entry.stored for entry in entries) - self._free()
        removed = []
        for entry in entries:
            if max(over, lacking) <= 0:
                break
            if not _in_use(entry.path):
                removed.append(entry)
                over, lacking = over - entry.size, lacking - entry.size
        for entry in removed if max(over, lacking) <= 0 else ():
            if not _remove_unless_in_use(entry.path):  # since a moment ago
                over, lacking = over + entry.size, lacking + entry.size
        if lacking > 0:
            raise DiskFull.of(self.folder, f"no space left on the device for the {size:,} bytes of {path.name}")
        if over > 0:
            raise CacheFull(
                f"--cache {self.folder}: no room for {path.name}: all of the {self.limit:,} bytes that it may hold "
                "are in use; give a larger --cache-size"
            )

    def _free(self) -> float:
        """Bytes free on the file system; infinite where it does not say, as some in user space: writing will tell."""
        usage = shutil.disk_usage(self.folder)
        return usage.free if usage.total else math.inf

    def _entries(self) -> list[_Entry]:
        entries = []
        for path in self.folder.glob("*/*"):
            with contextlib.suppress(FileNotFoundError):  # parts are renamed without the folder's lock
                found = path.stat()
                size = int(path.name.split(".")[-2]) if path.name.endswith(PART) else found.st_size
                entries.append(_Entry(path, size, found.st_size, found.st_mtime_ns))
        return entries


class Part:
    """What there is so far of a file that this process fetches."""

    def __init__(self, handle: int, path: Path, target: Path, size: int) -> None:
        self._handle, self._path, self._target = handle, path, target
        self.done = min(os.fstat(handle).st_size, size)
        """Bytes that are there."""

    def read(self, start: int, stop: int) -> bytes:
        return os.pread(self._handle, stop - start, start)

    def append(self, content: bytes) -> None:
        """Add to the end.

        Raises:
            DiskFull: the disk is full; what was there is removed, as it may be in others' way.
            StorageFailed: the disk failed otherwise.
        """
        view = memoryview(content)
        with self._explained():
            while view:
                written = os.pwrite(self._handle, view, self.done)
                self.done, view = self.done + written, view[written:]

    def restart(self) -> None:
        """Throw away what is there."""
        os.ftruncate(self._handle, 0)
        self.done = 0

    def finish(self) -> int:
        """Publish the whole file under its name; returns a lease of it. Raises what `append` does."""
        with self._explained():
            os.ftruncate(self._handle, self.done)
            os.fsync(self._handle)
            fcntl.flock(self._handle, fcntl.LOCK_SH)
            self._path.rename(self._target)
            return os.dup(self._handle)

    def discard(self) -> None:
        """Remove what is there."""
        self._path.unlink(missing_ok=True)

    def __enter__(self) -> Part:
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of it; if it is not finished, another process may go on."""
        os.close(self._handle)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in _FULL:
                self.discard()
            raise _failed(self._path.parent.parent, error) from error


def _locked(handle: int, path: Path) -> bool:
    """Whether the exclusive lock was got, and of the file of this name: its last holder may have renamed it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.fstat(handle).st_ino == path.stat().st_ino
    except (BlockingIOError, FileNotFoundError):
        return False


def _in_use(path: Path) -> bool:
    with _alone(path) as alone:
        return not alone


def _remove_unless_in_use(path: Path) -> bool:
    with _alone(path) as alone:
        if alone:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not empty
                path.parent.rmdir()
        return alone


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[bool]:
    """Whether nobody else has it, for as long as this lasts; nobody has a file that is not there."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        yield True
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = True
        except BlockingIOError:
            alone = False
        yield alone
    finally:
        os.close(handle)


def _failed(folder: Path, error: OSError) -> UserError:
    if error.errno in _FULL:
        return DiskFull.of(folder, str(error.strerror))
    return StorageFailed(f"--cache {folder}: {error.strerror}; mend that, or give another folder")

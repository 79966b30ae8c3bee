"""A bounded folder of fetched files that the processes of a node share; the least recently used one is evicted first.

The cache works in a subfolder that it has made and marked (`pipeline.storage.cache.folder`), and counts and removes
only files that it has recorded (`pipeline.storage.cache.record`). All coordination is by the kernel's file locks, which
go when their holder dies, however it dies:

- a process that uses a file holds a shared lock on it (a *lease*), and no process evicts it;
- a process that fetches a file holds an exclusive lock on its part, which counts as if it were whole already; the part
  of a process that died is resumed by the next one;
- files are recorded, published and evicted under one lock of the folder, so that the bound holds for all processes
  together.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import xxhash

from pipeline.storage.cache.errors import ForeignFile, PartRemoved, cache_errors, storage_failed
from pipeline.storage.cache.eviction import Eviction, Stored, forget, status_of
from pipeline.storage.cache.folder import REMEDY, CacheFolder
from pipeline.storage.cache.partial_file import Busy, PartialFile
from pipeline.storage.cache.record import Entry, new_entry
from shards.errors import UserError
from shards.files.private_folder import NotPrivate, open_file
from shards.schema import plain_file_name

log = logging.getLogger(__name__)

# Of what is free on the file system (or taken by the cache already), when no bound is given.
DEFAULT_SHARE = 0.8
# The folder itself is at fault, and will be at the next start.
_UNUSABLE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.ENOENT),
    *(errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL),
)
_CHUNK = 8 << 20


def _never() -> None:
    """Do nothing: the caller cannot be interrupted."""


class Cache:
    """A cache of one node.

    Args:
        place: a folder on a local disk, which may hold other things; the cache makes a subfolder of it.
        limit: bytes that all cached files together may take, above 0; None = four fifths of what is free there.
        shared: all members of the folder's group use one cache. Files of other users are read once they are found to
            have the right hash; members of the group are trusted not to change them later.

    Raises:
        UserError: the folder cannot be used: see `CacheFolder.locked`.
        DiskFull: there is not even room for its record.
    """

    def __init__(self, place: Path, limit: int | None = None, shared: bool = False) -> None:
        if limit is not None and not 0 < limit < math.inf:
            raise UserError(f"--cache-size: {limit} bytes, expected a finite size above 0")
        self.place, self._folder = place, CacheFolder(place, shared=shared)
        self._eviction = Eviction(place, self._folder)
        # (path, device, inode, size, time of change) of files whose hash this process knows to be right.
        self._verified: set[tuple[Path, int, int, int, int]] = set()
        try:
            with self._folder.locked(_never) as (root, record):
                used = sum(stored.entry.size for stored in self._eviction.stored(root, record))
                damaged = record.damaged
            share = (shutil.disk_usage(self.folder).free + used) * DEFAULT_SHARE
        except OSError as error:
            if error.errno not in _UNUSABLE:
                raise storage_failed(self.place, error) from error
            raise UserError(f"--cache {self.place}: cannot be used ({error.strerror}); give another folder") from error
        if damaged:
            log.warning(
                "%s: %d damaged lines; files that they named are neither counted nor removed", record.path, damaged
            )
        self.limit = int(share if limit is None else limit)

    @property
    def folder(self) -> Path:
        """The cache's own folder; files are in FOLDER/SET/NAME."""
        return self._folder.path

    def __reduce__(self) -> tuple[type[Cache], tuple[Path, int, bool]]:
        """Pickle the folder only; the other process verifies its files itself."""
        return Cache, (self.place, self.limit, self._folder.shared)

    def lease(self, path: Path, size: int, digest: str, *, check_interrupt: Callable[[], None] = _never) -> int | None:
        """Open a finished file, which is not evicted while the descriptor is open; None if there is no such file.

        A file of another size is discarded. So is one of another hash, which is computed when this process leases the
        file for the first time, unless it has fetched it itself, and again when the file has changed since.

        Args:
            path: FOLDER/SET/NAME.
            size: bytes.
            digest: xxh3-64, 16 hex digits.
            check_interrupt: called repeatedly; raises to end the call.

        Raises:
            ForeignFile: there is such a file with other content that the cache has not made.
            CacheLocked, StorageFailed: the cache cannot be read.
        """
        folder, _ = self._place_of(path)
        with cache_errors(self.place):
            try:
                with self._folder.opened() as root, self._folder.set_folder(root, folder) as inside:
                    handle = self._open(path, os.O_RDONLY, inside)
            except FileNotFoundError:
                return None
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
                found = os.fstat(handle)
                if not found.st_nlink:
                    os.close(handle)
                    return None
                fault = self._fault(path, handle, size, digest, check_interrupt)
                if fault is None:
                    with contextlib.suppress(PermissionError):  # another user's
                        os.utime(handle, ns=(time.time_ns(), found.st_mtime_ns))
                    return handle
                self._discard(path, found, fault, check_interrupt)
            except BlockingIOError:  # about to be removed
                pass
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)
            return None

    def begin(self, path: Path, size: int, *, check_interrupt: Callable[[], None] = _never) -> PartialFile | Busy:
        """Become the one process that fetches a file. Arguments as of `lease`.

        Raises:
            CacheFull: there is no room, and nothing that is not in use.
            ForeignFile: the name is taken by something that the cache has not made.
            CacheLocked, StorageFailed: the cache cannot be written.
        """
        folder, name = self._place_of(path)
        with (
            cache_errors(self.place),
            self._folder.locked(check_interrupt) as (root, record),
            self._folder.set_folder(root, folder, create=True) as inside,
        ):
            entry = record.entries.get((folder, name))
            if (found := status_of(name, inside)) is not None:
                if entry is None or entry.state != "whole":
                    raise self._foreign_file(path)
                return Busy(path, found.st_size)
            handle = None if entry is None or entry.size != size else self._open_part(entry, inside)
            if entry is None or handle is None:
                if entry is not None and not self._eviction.evict(Stored(entry, entry.part, 0, 0), root, record):
                    return Busy(path, 0)  # with another size; it will be found to be damaged
                self._eviction.make_room(size, path, root, record, limit=self.limit)
                entry = new_entry(folder, name, size)
                record.put(entry)
                part = self.folder / folder / entry.part
                handle = self._open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, inside)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                busy = Busy(path, os.fstat(handle).st_size, self.folder / folder / entry.part)
                os.close(handle)
                return busy
            return PartialFile(self, handle, path, entry, check_interrupt)

    def publish(self, part: PartialFile) -> int:
        """Rename a verified part to its final name; return a lease. For `PartialFile.finish`."""
        folder, name = part.entry.key
        handle, path = part.handle, part.path
        with (
            self._folder.locked(part.check_interrupt) as (root, record),
            self._folder.set_folder(root, folder, create=True) as inside,
        ):
            mine = os.fstat(handle)
            found = status_of(part.entry.part, inside)
            if found is None or found.st_ino != mine.st_ino:
                raise PartRemoved(f"{path}: removed while it was fetched")
            if status_of(name, inside) is not None:
                raise self._foreign_file(path)
            # The folder's lock is held, so no process evicts the file between the two locks.
            fcntl.flock(handle, fcntl.LOCK_SH)
            record.put(replace(part.entry, state="whole"))
            os.rename(part.entry.part, name, src_dir_fd=inside, dst_dir_fd=inside)
            os.utime(handle, ns=(time.time_ns(), mine.st_mtime_ns))
            self._verified.add(_identity(path, os.fstat(handle)))
            return os.dup(handle)

    def remove_part(self, part: PartialFile) -> None:
        """For `PartialFile.discard`."""
        folder, _ = part.entry.key
        with cache_errors(self.place), self._folder.locked(part.check_interrupt) as (root, record):
            if record.entries.get(part.entry.key) == part.entry:
                with contextlib.suppress(FileNotFoundError), self._folder.set_folder(root, folder) as inside:
                    os.unlink(part.entry.part, dir_fd=inside)
                forget(part.entry, record)

    def _place_of(self, path: Path) -> tuple[str, str]:
        folder, name = path.parent.name, path.name
        try:
            if path.parent.parent != self.folder:
                raise ValueError(f"not in a folder of {self.folder}")
            return plain_file_name(folder), plain_file_name(name)
        except ValueError as error:
            raise UserError(f"{path}: {error}, so the cache cannot hold it") from error

    def _open(self, path: Path, flags: int, folder: int) -> int:
        shared = self._folder.shared
        return open_file(path.name, flags, folder=folder, path=path, remedy=REMEDY, shared=shared)

    def _open_part(self, entry: Entry, folder: int) -> int | None:
        """None where there is none, or nothing that can be written on."""
        try:
            return self._open(self.folder / entry.folder / entry.part, os.O_RDWR, folder)
        except (FileNotFoundError, NotPrivate):
            return None

    def _fault(
        self, path: Path, handle: int, size: int, digest: str, check_interrupt: Callable[[], None]
    ) -> str | None:
        """Return what is wrong with the file; None = nothing."""
        found = os.fstat(handle)
        if found.st_size != size:
            return f"{size:,} bytes expected, {found.st_size:,} found"
        if _identity(path, found) in self._verified:
            return None
        hashed = xxhash.xxh3_64()
        for at in range(0, size, _CHUNK):
            check_interrupt()
            hashed.update(os.pread(handle, _CHUNK, at))
        if hashed.hexdigest() != digest:
            return f"hash {digest} expected, {hashed.hexdigest()} found"
        self._verified.add(_identity(path, found))
        return None

    def _discard(self, path: Path, damaged: os.stat_result, fault: str, check_interrupt: Callable[[], None]) -> None:
        """Remove a damaged file. Processes that have it open can still read it; no other process opens it."""
        folder, name = self._place_of(path)
        with (
            contextlib.suppress(FileNotFoundError),
            self._folder.locked(check_interrupt) as (root, record),
            self._folder.set_folder(root, folder) as inside,
        ):
            entry = record.entries.get((folder, name))
            found = status_of(name, inside)
            if found is None or found.st_ino != damaged.st_ino:
                return
            if entry is None or entry.state != "whole":
                raise self._foreign_file(path, fault)
            log.warning("%s: damaged in the cache (%s); removed, and fetched again", path, fault)
            os.unlink(name, dir_fd=inside)
            forget(entry, record)

    def _foreign_file(self, path: Path, fault: str = "") -> ForeignFile:
        facts = f"not the set's file ({fault}), and " if fault else ""
        return ForeignFile(f"{path}: {facts}not recorded as made by this cache; move it away, or give another --cache")


def _identity(path: Path, found: os.stat_result) -> tuple[Path, int, int, int, int]:
    return path, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns

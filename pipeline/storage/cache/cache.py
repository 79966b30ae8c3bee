"""A bounded folder of downloaded files, shared by the processes of a node; the least recently used are evicted first.

The cache works in a subfolder that it has created and marked (`pipeline.storage.cache.folder`). It counts and removes
only files that it has recorded (`pipeline.storage.cache.record`). Processes coordinate by file locks (flock), which the
kernel releases when their holder dies:

- A process that uses a file holds a shared lock on it (a *lease*). A file with a lease is not evicted.
- A process that downloads a file holds an exclusive lock on its partial file, which counts with its final size. If the
  process dies, the next one resumes the download.
- Files are recorded, published and evicted while holding the lock of the folder, so that the size limit applies to all
  processes together.
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
from pipeline.storage.cache.eviction import CachedFile, Eviction, forget, status_of
from pipeline.storage.cache.folder import REMEDY, CacheFolder
from pipeline.storage.cache.partial_file import Busy, PartialFile
from pipeline.storage.cache.record import Entry, new_entry
from shards.errors import UserError
from shards.files.private_folder import NotPrivate, open_file
from shards.schema import plain_file_name

log = logging.getLogger(__name__)

# Default limit, as a fraction of the space that is free on the file system or used by the cache.
DEFAULT_FRACTION = 0.8
# Errors caused by the folder itself, so that another attempt with the same folder fails too.
_UNUSABLE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.ENOENT),
    *(errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL),
)
_CHUNK = 8 << 20


def _never() -> None:
    """Do nothing: the caller cannot be interrupted."""


class Cache:
    """The cache of one node.

    Args:
        parent: folder on a local disk, which may contain other files; the cache creates a subfolder in it.
        limit: maximum total size of the cached files in bytes, above 0. None: `DEFAULT_FRACTION` of the free space.
        shared: share the cache with all members of the folder's group. Files of other users are read after their hash
            has been verified; members of the group are trusted not to change them later.

    Raises:
        UserError: the folder cannot be used; see `CacheFolder.locked`.
        DiskFull: the disk is too full to write the cache's record.
    """

    def __init__(self, parent: Path, limit: int | None = None, shared: bool = False) -> None:
        if limit is not None and not 0 < limit < math.inf:
            raise UserError(f"--cache-size: expected a finite size above 0, got {limit} bytes")
        self.parent, self._folder = parent, CacheFolder(parent, shared=shared)
        self._eviction = Eviction(parent, self._folder)
        # (path, device, inode, size, modification time) of files whose hash this process has verified.
        self._verified: set[tuple[Path, int, int, int, int]] = set()
        try:
            with self._folder.locked(_never) as (root, record):
                used = sum(file.entry.size for file in self._eviction.cached_files(root, record))
                damaged = record.damaged
            default = (shutil.disk_usage(self.folder).free + used) * DEFAULT_FRACTION
        except OSError as error:
            if error.errno not in _UNUSABLE:
                raise storage_failed(self.parent, error) from error
            raise UserError(
                f"--cache {self.parent}: cannot be used as a cache ({error.strerror}); specify another folder"
            ) from error
        if damaged:
            log.warning(
                "%s: ignoring %d damaged lines; the cache neither counts nor removes the files that they recorded",
                record.path,
                damaged,
            )
        self.limit = int(default if limit is None else limit)

    @property
    def folder(self) -> Path:
        """Folder of the cache; it contains the files as FOLDER/SET/NAME."""
        return self._folder.path

    def __reduce__(self) -> tuple[type[Cache], tuple[Path, int, bool]]:
        """Pickle the arguments only: the receiving process must verify files itself."""
        return Cache, (self.parent, self.limit, self._folder.shared)

    def lease(self, path: Path, size: int, digest: str, *, check_interrupt: Callable[[], None] = _never) -> int | None:
        """Open a complete file; it is not evicted while the descriptor is open.

        A file whose size or hash is wrong is removed. The hash is verified when this process leases the file for the
        first time, unless it has downloaded the file itself, and again after the file has changed.

        Args:
            path: FOLDER/SET/NAME.
            size: expected size in bytes.
            digest: expected hash, xxh3-64 in 16 hex digits.
            check_interrupt: called repeatedly; raises to end the call.

        Returns:
            File descriptor; None if the cache does not contain the file.

        Raises:
            ForeignFile: a file with this name and other content exists that the cache did not create.
            CacheLocked, StorageFailed: the cache cannot be read.
        """
        folder, _ = self._set_and_name(path)
        with cache_errors(self.parent):
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
                    with contextlib.suppress(PermissionError):  # the file belongs to another user of a shared cache
                        os.utime(handle, ns=(time.time_ns(), found.st_mtime_ns))
                    return handle
                self._discard(path, found, fault, check_interrupt)
            except BlockingIOError:  # another process is about to remove the file
                pass
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)
            return None

    def begin(self, path: Path, size: int, *, check_interrupt: Callable[[], None] = _never) -> PartialFile | Busy:
        """Start or resume the download of a file, in at most one process at a time. Arguments are those of `lease`.

        Returns:
            The partial file to write; `Busy` if another process downloads the file or has completed it.

        Raises:
            CacheFull: there is no free space, and all cached files are in use.
            ForeignFile: a file with this name exists that the cache did not create.
            CacheLocked, StorageFailed: the cache cannot be written.
        """
        folder, name = self._set_and_name(path)
        with (
            cache_errors(self.parent),
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
                if entry is not None and not self._eviction.evict(CachedFile(entry, entry.part, 0, 0), root, record):
                    return Busy(path, 0)  # another process expects a different size; `lease` will reject the file
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
        """Rename a complete, verified file to its final name and return a lease. Called by `PartialFile.finish`."""
        folder, name = part.entry.key
        handle, path = part.handle, part.path
        with (
            self._folder.locked(part.check_interrupt) as (root, record),
            self._folder.set_folder(root, folder, create=True) as inside,
        ):
            mine = os.fstat(handle)
            found = status_of(part.entry.part, inside)
            if found is None or found.st_ino != mine.st_ino:
                raise PartRemoved(f"{path}: its partial file was removed by another program during the download")
            if status_of(name, inside) is not None:
                raise self._foreign_file(path)
            # Changing the lock from exclusive to shared is not atomic; the folder's lock prevents eviction meanwhile.
            fcntl.flock(handle, fcntl.LOCK_SH)
            record.put(replace(part.entry, state="whole"))
            os.rename(part.entry.part, name, src_dir_fd=inside, dst_dir_fd=inside)
            os.utime(handle, ns=(time.time_ns(), mine.st_mtime_ns))
            self._verified.add(_identity(path, os.fstat(handle)))
            return os.dup(handle)

    def remove_part(self, part: PartialFile) -> None:
        """Remove a partial file and its record. Called by `PartialFile.discard`."""
        folder, _ = part.entry.key
        with cache_errors(self.parent), self._folder.locked(part.check_interrupt) as (root, record):
            if record.entries.get(part.entry.key) == part.entry:
                with contextlib.suppress(FileNotFoundError), self._folder.set_folder(root, folder) as inside:
                    os.unlink(part.entry.part, dir_fd=inside)
                forget(part.entry, record)

    def _set_and_name(self, path: Path) -> tuple[str, str]:
        folder, name = path.parent.name, path.name
        try:
            if path.parent.parent != self.folder:
                raise ValueError(f"not in a subfolder of {self.folder}")
            return plain_file_name(folder), plain_file_name(name)
        except ValueError as error:
            raise UserError(f"{path}: cannot be stored in the cache: {error}") from error

    def _open(self, path: Path, flags: int, folder: int) -> int:
        shared = self._folder.shared
        return open_file(path.name, flags, folder=folder, path=path, remedy=REMEDY, shared=shared)

    def _open_part(self, entry: Entry, folder: int) -> int | None:
        """Return a descriptor of the partial file; None if it does not exist or is not safe to write."""
        try:
            return self._open(self.folder / entry.folder / entry.part, os.O_RDWR, folder)
        except (FileNotFoundError, NotPrivate):
            return None

    def _fault(
        self, path: Path, handle: int, size: int, digest: str, check_interrupt: Callable[[], None]
    ) -> str | None:
        """Describe what is wrong with the file; return None if its size and hash are right."""
        found = os.fstat(handle)
        if found.st_size != size:
            return f"expected {size:,} bytes, found {found.st_size:,}"
        if _identity(path, found) in self._verified:
            return None
        hashed = xxhash.xxh3_64()
        for offset in range(0, size, _CHUNK):
            check_interrupt()
            hashed.update(os.pread(handle, _CHUNK, offset))
        if hashed.hexdigest() != digest:
            return f"expected hash {digest}, found {hashed.hexdigest()}"
        self._verified.add(_identity(path, found))
        return None

    def _discard(self, path: Path, damaged: os.stat_result, fault: str, check_interrupt: Callable[[], None]) -> None:
        """Remove a damaged file. Processes that have it open can still read it."""
        folder, name = self._set_and_name(path)
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
            log.warning("%s: damaged in the cache (%s); removed, downloading it again", path, fault)
            os.unlink(name, dir_fd=inside)
            forget(entry, record)

    def _foreign_file(self, path: Path, fault: str = "") -> ForeignFile:
        facts = f" and is not the file of the set ({fault})" if fault else ""
        return ForeignFile(
            f"{path}: was not created by this cache{facts}; move it away, or specify another folder with --cache"
        )


def _identity(path: Path, found: os.stat_result) -> tuple[Path, int, int, int, int]:
    return path, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns

"""Eviction of the least recently used cached files that no process uses."""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import shutil
import stat
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.storage.cache.errors import CacheFull, DiskFull
from pipeline.storage.cache.folder import REMEDY, CacheFolder
from pipeline.storage.cache.record import Entry, Record
from shards.files.private_folder import NotPrivate, open_file


@dataclass(frozen=True)
class CachedFile:
    """A recorded file that exists, complete or partial."""

    entry: Entry
    name: str
    """Current file name."""
    stored: int
    """Current size in bytes."""
    used: int
    """Time of last use, in nanoseconds."""


@dataclass(frozen=True)
class Eviction:
    """Lists and removes the files of a cache. The caller of each method holds the folder's lock.

    Arguments of its methods: `root`, descriptor of the cache's folder; `record`, the files that the cache has created.
    """

    parent: Path
    """The folder that `--cache` names."""
    folder: CacheFolder

    def cached_files(self, root: int, record: Record) -> list[CachedFile]:
        """Return the recorded files that exist; remove missing ones from the record."""
        files: list[CachedFile] = []
        by_folder: dict[str, list[Entry]] = {}
        for entry in record.entries.values():
            by_folder.setdefault(entry.folder, []).append(entry)
        for name, entries in by_folder.items():
            try:
                with self.folder.set_folder(root, name) as inside:
                    found = [(entry, _find(entry, inside)) for entry in entries]
            except FileNotFoundError:
                found = [(entry, None) for entry in entries]
            except NotPrivate:  # replaced, for example by a symbolic link to a folder outside the cache
                continue
            files.extend(file for _, file in found if file is not None)
            for entry, file in found:
                if file is None:
                    forget(entry, record)
        return files

    def make_room(self, size: int, path: Path, root: int, record: Record, *, limit: int) -> None:
        """Evict the least recently used files until `size` bytes fit; evict none if that is impossible.

        Raises:
            CacheFull: the file is larger than `limit`, or the files in use leave too little space.
            DiskFull: the disk is too full, because of files of other programs.
        """
        if size > limit:
            raise CacheFull(
                f"--cache {self.parent}: {path.name} has {size:,} bytes, more than the cache's limit of {limit:,} "
                "bytes; specify a larger --cache-size"
            )
        files = sorted(self.cached_files(root, record), key=lambda file: file.used)
        over = sum(file.entry.size for file in files) + size - limit
        # Other programs write to the disk too. Space for the rest of partial files is reserved.
        lacking = size + sum(file.entry.size - file.stored for file in files) - self._free()
        evicted = []
        for file in files:
            if max(over, lacking) <= 0:
                break
            if self.evict(file, root, record, dry=True):
                evicted.append(file)
                over, lacking = over - file.entry.size, lacking - file.entry.size
        for file in evicted if max(over, lacking) <= 0 else ():
            if not self.evict(file, root, record):  # another process has leased the file since the dry run
                over, lacking = over + file.entry.size, lacking + file.entry.size
        if lacking > 0:
            raise DiskFull.of(self.parent, f"no space left on the device for {path.name} ({size:,} bytes)")
        if over > 0:
            raise CacheFull(
                f"--cache {self.parent}: no space for {path.name} ({size:,} bytes): the cache has reached its limit of "
                f"{limit:,} bytes and its files are in use; specify a larger --cache-size"
            )

    def evict(self, file: CachedFile, root: int, record: Record, *, dry: bool = False) -> bool:
        """Remove a file that no process uses; return whether it was removed or, if `dry`, can be removed."""
        path = self.folder.path / file.entry.folder / file.name
        try:
            with self.folder.set_folder(root, file.entry.folder) as inside:
                handle = open_file(
                    path.name, os.O_RDWR, folder=inside, path=path, remedy=REMEDY, shared=self.folder.shared
                )
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if not dry:
                        os.unlink(file.name, dir_fd=inside)
                        forget(file.entry, record)
                    return True
                finally:
                    os.close(handle)
        except FileNotFoundError:
            return True
        except (BlockingIOError, NotPrivate):  # the file is in use, or was replaced by another program
            return False

    def _free(self) -> float:
        """Return the free bytes of the file system; infinity if it reports none (some FUSE systems)."""
        usage = shutil.disk_usage(self.folder.path)
        return usage.free if usage.total else math.inf


def _find(entry: Entry, folder: int) -> CachedFile | None:
    """Find the complete or partial file of an entry in its folder; return None if it does not exist."""
    for name in (entry.name, entry.part) if entry.state == "whole" else (entry.part,):
        found = status_of(name, folder)
        if found is not None and stat.S_ISREG(found.st_mode):
            return CachedFile(entry, name, found.st_size, max(found.st_atime_ns, found.st_mtime_ns))
    return None


def status_of(name: str, folder: int) -> os.stat_result | None:
    """Return the status of a directory entry, without following symbolic links; None if it does not exist."""
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None


def forget(entry: Entry, record: Record) -> None:
    """Remove a missing file from the record. If that fails (full disk), the next process tries again."""
    with contextlib.suppress(OSError):
        record.put(replace(entry, state="gone"), durable=False)

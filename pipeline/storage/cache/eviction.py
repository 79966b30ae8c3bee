"""Which files of the cache exist, and which are evicted to make room: the least recently used that nobody uses."""

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
class Stored:
    """A recorded file that exists."""

    entry: Entry
    name: str
    """Current file name."""
    stored: int
    """Current size in bytes."""
    used: int
    """Time of last use, in nanoseconds."""


@dataclass(frozen=True)
class Eviction:
    """Looks at the files of a cache and removes some. All calls are made with the folder's lock held.

    Args of its methods: `root`, descriptor of the cache's folder; `record`, the files that the cache has made.
    """

    place: Path
    """The folder that `--cache` names."""
    folder: CacheFolder

    def stored(self, root: int, record: Record) -> list[Stored]:
        """Return the recorded files that exist; remove all others from the record."""
        stored: list[Stored] = []
        by_folder: dict[str, list[Entry]] = {}
        for entry in record.entries.values():
            by_folder.setdefault(entry.folder, []).append(entry)
        for name, entries in by_folder.items():
            try:
                with self.folder.set_folder(root, name) as inside:
                    found = [(entry, _find(entry, inside)) for entry in entries]
            except FileNotFoundError:
                found = [(entry, None) for entry in entries]
            except NotPrivate:  # such as a symbolic link, whose target does not belong to the cache
                continue
            stored.extend(file for _, file in found if file is not None)
            for entry, file in found:
                if file is None:
                    forget(entry, record)
        return stored

    def make_room(self, size: int, path: Path, root: int, record: Record, *, limit: int) -> None:
        """Evict the least recently used files until `size` bytes fit; evict none if that is impossible."""
        if size > limit:
            raise CacheFull(
                f"--cache {self.place}: {path.name} has {size:,} bytes, more than the {limit:,} that the "
                "cache may hold; give a larger --cache-size"
            )
        files = sorted(self.stored(root, record), key=lambda file: file.used)
        over = sum(file.entry.size for file in files) + size - limit
        # Others write to the disk too; what parts still lack of their size is spoken for.
        lacking = size + sum(file.entry.size - file.stored for file in files) - self._free()
        evicted = []
        for file in files:
            if max(over, lacking) <= 0:
                break
            if self.evict(file, root, record, dry=True):
                evicted.append(file)
                over, lacking = over - file.entry.size, lacking - file.entry.size
        for file in evicted if max(over, lacking) <= 0 else ():
            if not self.evict(file, root, record):  # in use since a moment ago
                over, lacking = over + file.entry.size, lacking + file.entry.size
        if lacking > 0:
            raise DiskFull.of(self.place, f"no space left on the device for the {size:,} bytes of {path.name}")
        if over > 0:
            raise CacheFull(
                f"--cache {self.place}: no room for {path.name}: all of the {limit:,} bytes that it may hold "
                "are in use; give a larger --cache-size"
            )

    def evict(self, file: Stored, root: int, record: Record, *, dry: bool = False) -> bool:
        """Remove an unused file; return whether it was removed, or with `dry` whether it can be."""
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
        except (BlockingIOError, NotPrivate):  # in use, or replaced by a foreign file
            return False

    def _free(self) -> float:
        """Bytes free on the file system; infinite where it does not say, as some in user space: writing will tell."""
        usage = shutil.disk_usage(self.folder.path)
        return usage.free if usage.total else math.inf


def _find(entry: Entry, folder: int) -> Stored | None:
    """Find the complete file or its part."""
    for name in (entry.name, entry.part) if entry.state == "whole" else (entry.part,):
        found = status_of(name, folder)
        if found is not None and stat.S_ISREG(found.st_mode):
            return Stored(entry, name, found.st_size, max(found.st_atime_ns, found.st_mtime_ns))
    return None


def status_of(name: str, folder: int) -> os.stat_result | None:
    """Return the status of what has this name, be it a symbolic link; None = nothing."""
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None


def forget(entry: Entry, record: Record) -> None:
    """Remove a missing file from the record. If that fails, as on a full disk, the next process tries again."""
    with contextlib.suppress(OSError):
        record.put(replace(entry, state="gone"), durable=False)

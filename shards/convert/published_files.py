"""Publish the files of a set without ever replacing a file that this project did not create."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

import xxhash
from pydantic import TypeAdapter

from shards.convert.records import Published, hash_file, load_record, save_record
from shards.errors import UserError
from shards.files.durable import durable_write, sync_folder
from shards.format.index import Index, write_index
from shards.format.tar import BLOCK, END, header, key_of

_PUBLISHED = TypeAdapter(Published)


class PublishedFiles:
    """The published files of a set. A record of each, in the work folder, identifies it as created by this project.

    Args:
        out: folder of the set.
        path: work folder.
    """

    def __init__(self, out: Path, path: Path) -> None:
        self.out, self.path = out, path

    def reject_foreign_files(self, names: Iterable[str]) -> None:
        """Check that existing files of these names were created by this project and may be replaced.

        Raises:
            UserError: a file differs from the record of the published file, or has no record.
        """
        for name in names:
            path = self.out / name
            if mode_of(path) and not self._matches_record(path):
                raise foreign_file(path, "was not written by this command")

    def publish(self, name: str, content: bytes) -> str:
        """Write a file of the set, replacing an earlier version; return its xxh3-64 as 16 hex digits.

        Raises:
            UserError: a file of this name exists that this project did not create.
        """
        self.reject_foreign_files([name])
        digest = xxhash.xxh3_64_hexdigest(content)
        self._record(name, len(content), digest)
        durable_write(self.out / name, content)
        return digest

    def publish_file(self, finished: Path, name: str, digest: str | None) -> None:
        """Move a finished file from the work folder into the set. Otherwise like `publish`."""
        self.reject_foreign_files([name])
        self._record(name, finished.stat().st_size, digest)
        finished.rename(self.out / name)
        sync_folder(self.out)

    def has_published(self) -> bool:
        """Return whether any file of the set was published."""
        return next(self.path.glob("*.published"), None) is not None

    def publish_index(self, name: str, samples: int, shards: Iterable[Index]) -> str:
        """Publish an index with `samples` rows, concatenated from the rows of its shards; return its xxh3-64."""
        digest = write_index(self.path / name, samples, shards)
        self.publish_file(self.path / name, name, digest)
        return digest

    def remove_published(self, name: str) -> None:
        """Remove a file that was published before the conversion was interrupted, if any.

        Raises:
            UserError: a file of this name exists that this project did not create.
        """
        self.reject_foreign_files([name])
        (self.out / name).unlink(missing_ok=True)

    def _record(self, name: str, size: int, digest: str | None) -> None:
        save_record(self.path / f"{name}.published", _PUBLISHED, Published(bytes=size, hash=digest))

    def _matches_record(self, path: Path) -> bool:
        record = load_record(self.path / f"{path.name}.published", _PUBLISHED)
        if record is None or not stat.S_ISREG(mode_of(path)) or path.stat().st_size != record.bytes:
            return False
        return record.hash is None or hash_file(path) == record.hash


def foreign_file(path: Path, fact: str) -> UserError:
    """Return the error for a file or folder that this project did not create."""
    return UserError(f"{path}: {fact}, so it is not replaced; move it away, or specify another folder for the set")


def is_tar_of(path: Path, keys: set[str]) -> bool:
    """Return whether the first member of a tar is one that `SampleTar` wrote for a sample with one of these keys."""
    with path.open("rb") as file:
        head = file.read(BLOCK)
    name = head[:100].rstrip(b"\0").decode("latin-1")
    size = head[124:135]
    if not name:
        return path.stat().st_size == len(END) and head == bytes(BLOCK)  # a shard whose images were all rejected
    return key_of(name) in keys and size.isdigit() and head == header(name, int(size, 8))


def is_index_of(path: Path, keys: set[str]) -> bool:
    """Return whether the first lines of an .idx file are from `dali_index`, for a sample with one of these keys."""
    with path.open("rb") as file:
        first, second = (file.readline(2 * BLOCK).decode("latin-1").split() for _ in range(2))
    if first == ["v1.2", "0"]:
        return True
    return first[:1] == ["v1.2"] and len(second) == 8 and key_of(second[3]) in keys


def mode_of(path: Path) -> int:
    """Return `st_mode` without following symbolic links; 0 if the path does not exist."""
    try:
        return os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0


def size_of(path: Path) -> int | None:
    """Return the size of a regular file in bytes; None if there is no regular file."""
    status = path.lstat() if mode_of(path) else None
    return status.st_size if status and stat.S_ISREG(status.st_mode) else None

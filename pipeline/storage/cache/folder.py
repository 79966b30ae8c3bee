"""The folder of a cache: a marked subfolder that the cache has created itself, never a folder of the user."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import StringConstraints, TypeAdapter
from pydantic.dataclasses import dataclass

from pipeline.storage.cache.record import Record
from shards.errors import StorageFailed, UserError
from shards.files.durable import is_temporary
from shards.files.private_folder import open_file, open_folder, write_file
from shards.files.waiting import Wait, lock_holder
from shards.schema import parse_json

NAME = "fat-pipeline-cache"
"""Name of the subfolder; the user id or `shared` follows."""
MARKER = ".fat-pipeline-cache.json"
LOCK = ".lock"
LOCK_SECONDS = 60.0
"""Longest wait for the folder's lock, which is held only while a few files are removed."""
_UNUSUAL_SECONDS = 0.5  # of waiting, after which the holder is looked for: that takes milliseconds
_MARKER_LIMIT = 4096
REMEDY = "remove it, or give another --cache"


class CacheLocked(StorageFailed):
    """Another process has held the folder's lock for too long."""


@dataclass(frozen=True)
class _Marker:
    identity: Annotated[str, StringConstraints(pattern="^[0-9a-f]{32}$")]
    """Random; lines of the record are signed with it."""
    format: Literal["fat-pipeline cache"] = "fat-pipeline cache"
    version: Literal[1] = 1


_SCHEMA = TypeAdapter(_Marker)


class CacheFolder:
    """A marked folder with its lock and its record.

    Args:
        place: parent folder; may hold other files.
        shared: the folder is used by all members of the group of `place`.
    """

    def __init__(self, place: Path, *, shared: bool) -> None:
        self.shared = shared
        self.path = place.absolute() / f"{NAME}-{'shared' if shared else os.geteuid()}"
        hint = "" if shared else ", or share one with --cache-shared"
        self.remedy = f"{REMEDY}{hint}"
        self._record = Record(self.path, remedy=REMEDY, shared=shared)

    @contextlib.contextmanager
    def opened(self) -> Iterator[int]:
        """Return a descriptor of the folder, which is created if necessary, and checked."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle = open_folder(self.path, remedy=self.remedy, shared=self.shared)
        try:
            yield handle
        finally:
            os.close(handle)

    @contextlib.contextmanager
    def locked(self, check_interrupt: Callable[[], None]) -> Iterator[tuple[int, Record]]:
        """Hold the folder's lock; yields its descriptor and its record.

        Args:
            check_interrupt: called while another process holds the lock; raises to end the wait.

        Raises:
            CacheLocked: another process has held it for `LOCK_SECONDS`.
            UserError: the folder is not one that a cache has made.
            OSError: the disk is full, or failed.
        """
        with self.opened() as folder:
            self._refuse_foreign(folder)
            lock = self._lock(folder, check_interrupt)
            try:
                with self._record.opened(folder, self._marker(folder).identity):
                    yield folder, self._record
            finally:
                os.close(lock)

    @contextlib.contextmanager
    def set_folder(self, folder: int, name: str, *, create: bool = False) -> Iterator[int]:
        """A descriptor of a set's folder inside; FileNotFoundError where there is none."""
        handle = open_folder(self.path / name, remedy=REMEDY, shared=self.shared, inside=folder, create=create)
        try:
            yield handle
        finally:
            os.close(handle)

    def _lock(self, folder: int, check_interrupt: Callable[[], None]) -> int:
        wait: Wait | None = None
        since = 0.0
        while True:
            lock = self._open(folder, LOCK, os.O_RDWR | os.O_CREAT)
            locked = False
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                locked = os.fstat(lock).st_nlink > 0  # otherwise it was replaced by another lock file
            except BlockingIOError:
                if wait is None:
                    wait, since = Wait("", limit=LOCK_SECONDS, remedy="continue or end that process"), time.monotonic()
                if time.monotonic() - since > _UNUSUAL_SECONDS:
                    wait.what = f"{self.path / LOCK}: held by {lock_holder(lock)}"
            finally:
                if not locked:
                    os.close(lock)
            if locked:
                return lock
            check_interrupt()
            if wait is not None:
                try:
                    wait.pause(0.02)
                except StorageFailed as error:
                    raise CacheLocked(str(error)) from error

    def _refuse_foreign(self, folder: int) -> None:
        """Raise UserError if the folder has no marker and is not empty."""
        names = set(os.listdir(folder)) - {LOCK}
        unknown = sorted(name for name in names if not is_temporary(name, re.escape(MARKER)))
        # Asked for by name too: another process may be making the folder while it is listed.
        if unknown and MARKER not in names and not _exists(MARKER, folder):
            raise UserError(
                f"{self.path}: neither empty nor made by a cache ({len(unknown)} entries, such as {unknown[0]!r}, and "
                f"no {MARKER}); move it away, or give another --cache"
            )

    def _marker(self, folder: int) -> _Marker:
        """Return the folder's marker; write it if there is none."""
        path = self.path / MARKER
        try:
            handle = self._open(folder, MARKER, os.O_RDONLY)
        except FileNotFoundError:
            marker = _Marker(identity=secrets.token_hex(16))
            content = _SCHEMA.dump_json(marker, indent=1) + b"\n"
            write_file(MARKER, content, folder=folder, path=path, remedy=REMEDY, shared=self.shared)
            return marker
        try:
            return parse_json(os.pread(handle, _MARKER_LIMIT + 1, 0), _SCHEMA, limit=_MARKER_LIMIT)
        except ValueError as error:
            raise UserError(
                f"{path}: damaged ({error}), so the files of the cache cannot be identified; remove {self.path}, or "
                "give another --cache"
            ) from error
        finally:
            os.close(handle)

    def _open(self, folder: int, name: str, flags: int) -> int:
        return open_file(name, flags, folder=folder, path=self.path / name, remedy=REMEDY, shared=self.shared)


def _exists(name: str, folder: int) -> bool:
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True

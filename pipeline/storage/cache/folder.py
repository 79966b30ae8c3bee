"""The folder of a cache: a marked subfolder that the cache creates, so that it never works in a folder of the user."""

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
"""Prefix of the subfolder's name, followed by the user id or `shared`."""
MARKER = ".fat-pipeline-cache.json"
LOCK = ".lock"
LOCK_SECONDS = 60.0
"""Timeout in seconds for the folder's lock, which is normally held only while a few files are removed."""
_UNUSUAL_SECONDS = 0.5  # waiting time before the lock's holder is looked up, which takes milliseconds
_MARKER_LIMIT = 4096
REMEDY = "remove it, or specify another folder with --cache"
END_PROCESS = "end that process, or resume it if it is suspended"


class CacheLocked(StorageFailed):
    """Another process has held the folder's lock for longer than `LOCK_SECONDS`."""


@dataclass(frozen=True)
class _Marker:
    identity: Annotated[str, StringConstraints(pattern="^[0-9a-f]{32}$")]
    """Random identity of the folder, part of the hash of every line of the record."""
    format: Literal["fat-pipeline cache"] = "fat-pipeline cache"
    version: Literal[1] = 1


_SCHEMA = TypeAdapter(_Marker)


class CacheFolder:
    """A marked folder with its lock and its record.

    Args:
        parent: parent folder; may contain other files.
        shared: the folder is used by all members of the group of `parent`.
    """

    def __init__(self, parent: Path, *, shared: bool) -> None:
        self.shared = shared
        self.path = parent.absolute() / f"{NAME}-{'shared' if shared else os.geteuid()}"
        hint = "" if shared else ", or share a cache with --cache-shared"
        self.remedy = f"{REMEDY}{hint}"
        self._record = Record(self.path, remedy=REMEDY, shared=shared)

    @contextlib.contextmanager
    def opened(self) -> Iterator[int]:
        """Yield a descriptor of the folder, which is created if it does not exist. Checks its owner and mode."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle = open_folder(self.path, remedy=self.remedy, shared=self.shared)
        try:
            yield handle
        finally:
            os.close(handle)

    @contextlib.contextmanager
    def locked(self, check_interrupt: Callable[[], None]) -> Iterator[tuple[int, Record]]:
        """Hold the folder's lock; yield the folder's descriptor and its record.

        Args:
            check_interrupt: called while another process holds the lock; raises to end the wait.

        Raises:
            CacheLocked: another process has held the lock for `LOCK_SECONDS`.
            UserError: the folder was not created by a cache.
            OSError: the disk is full, or failed.
        """
        with self.opened() as folder:
            self._reject_foreign(folder)
            lock = self._lock(folder, check_interrupt)
            try:
                with self._record.opened(folder, self._marker(folder).identity):
                    yield folder, self._record
            finally:
                os.close(lock)

    @contextlib.contextmanager
    def set_folder(self, folder: int, name: str, *, create: bool = False) -> Iterator[int]:
        """Yield a descriptor of the subfolder of a set.

        Raises:
            FileNotFoundError: it does not exist, and `create` is False.
        """
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
                locked = os.fstat(lock).st_nlink > 0  # without a link, the lock file was removed, maybe recreated
            except BlockingIOError:
                if wait is None:
                    wait, since = Wait("", limit=LOCK_SECONDS, remedy=END_PROCESS), time.monotonic()
                if time.monotonic() - since > _UNUSUAL_SECONDS:
                    wait.what = f"{self.path / LOCK}: the lock of the cache is held by {lock_holder(lock)}"
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

    def _reject_foreign(self, folder: int) -> None:
        """Raise UserError if the folder has no marker and is not empty."""
        names = set(os.listdir(folder)) - {LOCK}
        unknown = sorted(name for name in names if not is_temporary(name, re.escape(MARKER)))
        # Check for the marker by name too: another process may have created it after the folder was listed.
        if unknown and MARKER not in names and not _exists(MARKER, folder):
            raise UserError(
                f"{self.path}: not created by a cache: it has {len(unknown)} entries, such as {unknown[0]!r}, but no "
                f"{MARKER}; move it away, or specify another folder with --cache"
            )

    def _marker(self, folder: int) -> _Marker:
        """Return the folder's marker; write it if it does not exist."""
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
                "specify another folder with --cache"
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

"""Stage one file of a remote set into the cache of this node."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import xxhash

from pipeline.storage.cache.cache import Cache
from pipeline.storage.cache.errors import PartRemoved
from pipeline.storage.cache.folder import END_PROCESS
from pipeline.storage.cache.partial_file import Busy, PartialFile
from pipeline.storage.remote.client import Remote
from pipeline.storage.remote.errors import RemoteError
from shards.errors import StorageFailed
from shards.files.waiting import Wait

log = logging.getLogger(__name__)

CHUNK = 8 << 20  # bytes per read when an interrupted download is hashed
MAX_DOWNLOADS = 3  # attempts to download a file with the right hash
STALLED_SECONDS = 120.0
"""Seconds without progress after which waiting for another process's download fails; longer than
`client.RETRY_SECONDS`."""
FETCH_SECONDS = 1800.0
"""Total seconds after which waiting for another process's download fails."""


@dataclass(frozen=True)
class StagedFile:
    """A file of a set, or a byte range of one, which is staged as one file of the cache."""

    name: str
    """File name in the cache."""
    bytes: int
    hash: str
    """xxh3-64, 16 hex digits, from the manifest."""
    source: str
    """File name on the server."""
    start: int = 0
    """Offset of the bytes in the file on the server."""


def whole_file(name: str, size: int, digest: str) -> StagedFile:
    """Describe a file that is staged completely, under its name on the server."""
    return StagedFile(name, size, digest, name)


def stage(
    file: StagedFile, remote: Remote, cache: Cache, folder: Path, *, check_interrupt: Callable[[], None] = lambda: None
) -> int | Busy:
    """Download a file into the cache unless the cache contains it. An interrupted download of any process is resumed.

    Args:
        folder: folder of the set in the cache.
        check_interrupt: called repeatedly during waits and hashing; raises to end the call.

    Returns:
        A lease (see `Cache.lease`), or `Busy` if another process downloads the file.

    Raises:
        CacheFull: the cache has no space for the file.
        ForeignFile: a file that the cache did not create has its name.
        StorageFailed: the cache's disk failed, or another process has held its lock for too long (`CacheLocked`).
        RemoteError: the server failed, or the file on the server has another hash.
    """
    path = folder / file.name
    lease = cache.lease(path, file.bytes, file.hash, check_interrupt=check_interrupt)
    if lease is not None:
        return lease
    part = cache.begin(path, file.bytes, check_interrupt=check_interrupt)
    if isinstance(part, Busy):
        return part
    with part:
        for _ in range(MAX_DOWNLOADS):
            if _fetch(file, remote, part) == file.hash:
                try:
                    return part.finish()
                except PartRemoved as error:
                    log.warning("%s; downloading it again", error)
                    return Busy(path, 0)
            log.warning(
                "%s/%s: the hash of the downloaded bytes differs from the manifest (damaged in transfer, or another "
                "version of the file); downloading it again",
                remote.url,
                file.source,
            )
            part.restart()
        part.discard()
        raise RemoteError(
            f"{remote.url}/{file.source}: downloaded {MAX_DOWNLOADS} times, but the hash of the {file.bytes:,} bytes "
            f"from offset {file.start} never matched the manifest: the file on the server is damaged or outdated; "
            "upload it again"
        )


def stage_now(file: StagedFile, remote: Remote, cache: Cache, folder: Path) -> int:
    """Stage a file and return a lease. Wait if another process is downloading it.

    Raises:
        StorageFailed: the other process made no progress for `STALLED_SECONDS`, or took `FETCH_SECONDS`.
        UserError: see `stage`.
    """
    other = DownloadWait(file)
    while isinstance(lease := stage(file, remote, cache, folder), Busy):
        other.pause(lease)
    return lease


class DownloadWait:
    """A wait for another process that is downloading a file."""

    def __init__(self, file: StagedFile) -> None:
        self._file, self._progress = file, Progress()
        self._wait = Wait("", limit=FETCH_SECONDS, remedy=END_PROCESS)

    def pause(self, busy: Busy, seconds: float = 0.1) -> None:
        """Sleep once.

        Raises:
            StorageFailed: the other process made no progress for `STALLED_SECONDS`, or took `FETCH_SECONDS`.
        """
        holder = f"{busy.path}: being downloaded by {busy.holder()}"
        self._wait.what = f"{holder}, which has {busy.done:,} of {self._file.bytes:,} bytes"
        if self._progress.stalled(busy):
            raise StorageFailed(
                f"{holder}, which has made no progress beyond {busy.done:,} of {self._file.bytes:,} bytes for "
                f"{STALLED_SECONDS:.0f} s; {END_PROCESS}"
            )
        self._wait.pause(seconds)


class Progress:
    """Tracks the progress of another process that is downloading a file."""

    def __init__(self) -> None:
        self._done, self._since = -1, time.monotonic()

    def stalled(self, busy: Busy) -> bool:
        """Return whether the number of downloaded bytes has not changed for `STALLED_SECONDS`."""
        if busy.done != self._done:
            self._done, self._since = busy.done, time.monotonic()
        return time.monotonic() - self._since > STALLED_SECONDS


def _fetch(file: StagedFile, remote: Remote, part: PartialFile) -> str:
    """Download the missing bytes; return the hash of the complete file."""
    digest = xxhash.xxh3_64()
    for offset in range(0, part.done, CHUNK):
        digest.update(part.read(offset, min(offset + CHUNK, part.done)))
    # If the server does not support range requests, only a file that is staged completely may be read from it: each
    # segment of a .beton would download the complete file again.
    whole = file.name == file.source
    for content in remote.pieces(file.source, file.start + part.done, file.start + file.bytes, whole=whole):
        digest.update(content)
        part.append(content)
    return digest.hexdigest()

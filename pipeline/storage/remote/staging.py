"""Stage one file of a remote set into the cache of this node, or find it there."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import xxhash

from pipeline.storage.cache.cache import Cache
from pipeline.storage.cache.errors import PartRemoved
from pipeline.storage.cache.partial_file import Busy, PartialFile
from pipeline.storage.remote.client import Remote
from pipeline.storage.remote.errors import RemoteError
from shards.errors import StorageFailed
from shards.files.waiting import Wait

log = logging.getLogger(__name__)

CHUNK = 8 << 20  # bytes of an interrupted download that are hashed at once
VERSIONS = 3  # times that a file is fetched anew when its bytes do not match its hash
# Waiting for another process that fetches a file ends when no byte has come for this long, which leaves it time to
# repeat a request,
STALLED_SECONDS = 120.0
# and in any case after this.
FETCH_SECONDS = 1800.0


@dataclass(frozen=True)
class StagedFile:
    """A file of a set, or a part of one, which becomes a file of the cache."""

    name: str
    """In the cache."""
    bytes: int
    hash: str
    """xxh3-64, 16 hex digits, from the manifest."""
    source: str
    """The file on the server."""
    start: int = 0
    """Where in it the bytes begin."""


def whole_file(name: str, size: int, digest: str) -> StagedFile:
    """A file that is staged as it is."""
    return StagedFile(name, size, digest, name)


def stage(
    file: StagedFile, remote: Remote, cache: Cache, folder: Path, *, check_interrupt: Callable[[], None] = lambda: None
) -> int | Busy:
    """Fetch a file into the cache, or find it there; a download that another process began is resumed.

    Args:
        folder: of the set, in the cache.
        check_interrupt: called repeatedly during waits and hashing; raises to end the call.

    Returns:
        A lease (see `Cache.lease`); `Busy` while another process fetches it.

    Raises:
        CacheFull: no room.
        ForeignFile: a file that the cache did not create has its name.
        StorageFailed: the cache's disk failed, or another process has held its lock for too long (`CacheLocked`).
        RemoteError: the server failed, or what it sends is not the file.
    """
    path = folder / file.name
    lease = cache.lease(path, file.bytes, file.hash, check_interrupt=check_interrupt)
    if lease is not None:
        return lease
    part = cache.begin(path, file.bytes, check_interrupt=check_interrupt)
    if isinstance(part, Busy):
        return part
    with part:
        for _ in range(VERSIONS):
            if _fetch(file, remote, part) == file.hash:
                try:
                    return part.finish()
                except PartRemoved as error:
                    log.warning("%s; fetched again", error)
                    return Busy(path, 0)
            log.warning("%s/%s: damaged on the way, or not the manifest's; fetched anew", remote.url, file.source)
            part.restart()
        part.discard()
        raise RemoteError(
            f"{remote.url}/{file.source}: fetched {VERSIONS} times, and the hash of its bytes from {file.start} on is "
            "never the manifest's: damaged or stale there; copy it there again"
        )


def stage_now(file: StagedFile, remote: Remote, cache: Cache, folder: Path) -> int:
    """Stage a file that is needed at once; returns a lease. Waits for another process that fetches it.

    Raises:
        StorageFailed: the other process makes no progress for `STALLED_SECONDS`, or takes `FETCH_SECONDS`.
        UserError: what `stage` raises.
    """
    other = OtherProcess(file)
    while isinstance(lease := stage(file, remote, cache, folder), Busy):
        other.pause(lease)
    return lease


class OtherProcess:
    """The wait for another process that fetches a file."""

    def __init__(self, file: StagedFile) -> None:
        self._file, self._progress = file, Progress()
        self._wait = Wait("", limit=FETCH_SECONDS, remedy="continue or end that process")

    def pause(self, busy: Busy, seconds: float = 0.1) -> None:
        """Sleep once.

        Raises:
            StorageFailed: no progress for `STALLED_SECONDS`, or `FETCH_SECONDS` are over.
        """
        holder = f"{busy.path}: fetched by {busy.holder()}"
        self._wait.what = f"{holder}, which has {busy.done:,} of {self._file.bytes:,} bytes"
        if self._progress.stalled(busy):
            raise StorageFailed(
                f"{holder}, which has stood at {busy.done:,} of {self._file.bytes:,} bytes for "
                f"{STALLED_SECONDS:.0f} s; continue or end that process"
            )
        self._wait.pause(seconds)


class Progress:
    """Tracks the progress of another process that fetches a file."""

    def __init__(self) -> None:
        self._done, self._since = -1, time.monotonic()

    def stalled(self, busy: Busy) -> bool:
        """Whether it has had the same number of bytes for `STALLED_SECONDS`."""
        if busy.done != self._done:
            self._done, self._since = busy.done, time.monotonic()
        return time.monotonic() - self._since > STALLED_SECONDS


def _fetch(file: StagedFile, remote: Remote, part: PartialFile) -> str:
    """Fetch what is missing; returns the hash of all."""
    digest = xxhash.xxh3_64()
    for at in range(0, part.done, CHUNK):
        digest.update(part.read(at, min(at + CHUNK, part.done)))
    # Of a server that sends whole files only, a file that is staged whole is taken as it comes. Of one staged in
    # parts, each part would be the whole file again.
    whole = file.name == file.source
    for content in remote.pieces(file.source, file.start + part.done, file.start + file.bytes, whole=whole):
        digest.update(content)
        part.append(content)
    return digest.hexdigest()

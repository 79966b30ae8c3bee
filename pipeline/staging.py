"""Shard sets behind a URL: staged once per node into a cache, the files that the plan needs next first.

The first batch waits for no shard: a sample whose file is not here yet is read from the server directly, as a range of
bytes. So a cache that is too small costs speed, and nothing else.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from pipeline.cache import Cache, CacheFull, Part
from pipeline.files import Interrupted, read_cached, read_fully
from pipeline.plan import Need
from pipeline.remote import Remote, RemoteError
from shards.errors import ShardSetError

log = logging.getLogger(__name__)

STAGING_THREADS = 4
CHUNK = 8 << 20  # bytes asked for at once
VERSIONS = 3  # times that a file is fetched anew when its bytes do not match its hash
# Files leased at once; each is a file descriptor. Others stay in the cache as long as there is room.
MAX_LEASES = 400
# Looked ahead at once: a set of few shards needs the same ones again and again, to the last epoch.
MAX_NEEDS = 1024
_LOOK_AGAIN_SECONDS = 0.2
_FULL_SECONDS = 5.0


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


def whole(name: str, size: int, digest: str) -> StagedFile:
    """A file that is staged as it is."""
    return StagedFile(name, size, digest, name)


def stage(file: StagedFile, remote: Remote, cache: Cache, folder: Path) -> int | None:
    """Fetch a file into the cache, or find it there; what an earlier process has fetched is gone on with.

    Returns:
        A lease (see `Cache.lease`); None while another process fetches it.

    Raises:
        CacheFull: no room.
        RemoteError: the server failed, or what it sends is not the file.
    """
    path = folder / file.name
    lease = cache.lease(path, file.bytes)
    if lease is not None:
        return lease
    part = cache.begin(path, file.bytes)
    if part is None:
        return None
    with part:
        lease = cache.lease(path, file.bytes)
        if lease is not None:  # another process was faster
            part.discard()
            return lease
        for _ in range(VERSIONS):
            if _fetch(file, remote, part) == file.hash:
                return part.finish()
            log.warning("%s/%s: damaged on the way, or not the manifest's; fetched anew", remote.url, file.source)
            part.restart()
        part.discard()
        raise RemoteError(
            f"{remote.url}/{file.source}: fetched {VERSIONS} times, and the hash of its bytes from {file.start} on is "
            "never the manifest's: damaged or stale there; copy it there again"
        )


def _fetch(file: StagedFile, remote: Remote, part: Part) -> str:
    """Fetch what is missing; returns the hash of all."""
    digest = xxhash.xxh3_64()
    for at in range(0, part.done, CHUNK):
        digest.update(part.read(at, min(at + CHUNK, part.done)))
    while part.done < file.bytes:
        start = file.start + part.done
        content = remote.read(file.source, start, min(start + CHUNK, file.start + file.bytes))
        if not content:
            raise RemoteError(
                f"{remote.url}/{file.source}: ends at byte {start}, {file.start + file.bytes} expected by the "
                "manifest: truncated; copy it there again"
            )
        digest.update(content)
        part.append(content)
    return digest.hexdigest()


class StagedFiles:
    """A split's files, some here and some still on the server (see `pipeline.files.ShardFiles`).

    Args:
        share: bytes of the cache that this process may hold at once.
    """

    def __init__(self, files: Sequence[StagedFile], *, remote: Remote, cache: Cache, folder: Path, share: int) -> None:
        self._files, self._remote, self._cache, self._folder, self._share = files, remote, cache, folder, share
        self._change = threading.Condition()
        self._upcoming: Iterator[Need] = iter(())
        self._next: Need | None = None
        self._needs: deque[Need] = deque()
        self._wanted: Counter[int] = Counter()  # how many needs ask for each file; in the order of the first of them
        self._wanted_bytes = 0
        self._leases: dict[int, int] = {}
        self._users: Counter[int] = Counter()
        self._under_way: set[int] = set()
        self._not_before: dict[int, float] = {}
        self._full_until = 0.0
        self._failure: BaseException | None = None
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"staging-{i}", daemon=True) for i in range(STAGING_THREADS)
        ]

    def expect(self, needs: Iterator[Need]) -> None:
        """What will be read, in order: staging begins."""
        self._upcoming = needs
        self.reached(-1)
        for thread in self._threads:
            thread.start()

    def reached(self, step: int) -> None:
        """All batches before `step` have been read."""
        with self._change:
            while self._needs and self._needs[0].last < step:
                self._drop(self._needs.popleft())
            self._look_ahead()
            self._change.notify_all()

    def read(self, file: int, target: NDArray[np.uint8], offset: int) -> None:
        """Fill `target` from the file, wherever it is.

        Raises:
            ShardSetError: the file ends before.
            RemoteError: staging of any file, or this read, has failed for good.
        """
        with self._leased(file) as handle:
            if handle is None:
                self._read_there(self._files[file], target, offset)
            else:
                read_fully(handle, target, offset, self._folder / self._files[file].name)

    def read_now(self, file: int, target: NDArray[np.uint8], offset: int) -> bool:
        with self._leased(file) as handle:
            return handle is not None and read_cached(handle, target, offset)

    def name(self, file: int) -> str:
        return f"{self._remote.url}/{self._files[file].source}"

    def interrupt(self) -> None:
        with self._change:
            self._closed = True
            self._change.notify_all()
        self._remote.interrupt()

    def close(self) -> None:
        self.interrupt()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()
        with self._change:
            self._wanted.clear()
            for file in list(self._leases):
                self._let_go(file)

    @contextlib.contextmanager
    def _leased(self, file: int) -> Iterator[int | None]:
        """Keep the file's lease, if there is one, while the block runs."""
        with self._change:
            if self._failure is not None:
                raise self._failure
            handle = self._leases.get(file)
            self._users[file] += 1
        try:
            yield handle
        finally:
            with self._change:
                self._users[file] -= 1
                self._let_go(file)

    def _read_there(self, entry: StagedFile, target: NDArray[np.uint8], offset: int) -> None:
        start = entry.start + offset
        content = self._remote.read(entry.source, start, start + len(target))
        if len(content) < len(target):
            raise ShardSetError(f"{self._remote.url}/{entry.source}: ends before byte {start + len(target)}: truncated")
        target[:] = np.frombuffer(content, np.uint8)

    def _look_ahead(self) -> None:
        """Want what is needed next, as far as the share of the cache goes."""
        while len(self._needs) < MAX_NEEDS:
            if self._next is None:
                self._next = next(self._upcoming, None)
                if self._next is None:
                    return
            new = [file for file in self._next.shards if file not in self._wanted]
            size = sum(self._files[file].bytes for file in new)
            if self._wanted and (self._wanted_bytes + size > self._share or len(self._wanted) + len(new) > MAX_LEASES):
                return
            self._wanted_bytes += size
            self._wanted.update(self._next.shards)
            self._needs.append(self._next)
            self._next = None

    def _drop(self, need: Need) -> None:
        for file in need.shards:
            self._wanted[file] -= 1
            if not self._wanted[file]:
                del self._wanted[file]
                self._wanted_bytes -= self._files[file].bytes
                self._let_go(file)

    def _let_go(self, file: int) -> None:
        """Give the lease back, unless it is still wanted or in use."""
        if file in self._leases and file not in self._wanted and not self._users[file]:
            os.close(self._leases.pop(file))

    def _work(self) -> None:
        """What each staging thread does."""
        while (file := self._choose()) is not None:
            lease = None
            try:
                lease = stage(self._files[file], self._remote, self._cache, self._folder)
            except CacheFull as error:
                if not self._full_until:
                    log.warning("%s; what finds no room is read from the server sample by sample", error)
                self._full_until = time.monotonic() + _FULL_SECONDS
            except Interrupted:
                return
            except BaseException as error:  # whatever it was, it belongs to the reader
                self._failure = error
                return
            with self._change:
                self._under_way.discard(file)
                if lease is None:
                    self._not_before[file] = time.monotonic() + _LOOK_AGAIN_SECONDS
                else:
                    self._leases[file] = lease
                    self._let_go(file)  # in case the reader is past it meanwhile

    def _choose(self) -> int | None:
        """Wait for a file to stage, the first that is needed; None when there is nothing more to do."""
        with self._change:
            while not self._closed and self._failure is None:
                now = time.monotonic()
                for file in self._wanted if now > self._full_until else ():
                    if file in self._leases or file in self._under_way or self._not_before.get(file, 0) > now:
                        continue
                    self._under_way.add(file)
                    return file
                self._change.wait(_LOOK_AGAIN_SECONDS)
            return None

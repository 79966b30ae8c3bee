"""Shard sets behind a URL: staged once per node into a cache, the files that the plan needs next first.

The first batch waits for no shard: a sample whose file is not here yet is read from the server directly, as a range of
bytes. So a cache that is too small costs speed, and nothing else.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from pipeline.plan import Need
from pipeline.storage.cache import Busy, Cache, CacheFull, CacheLocked, ForeignFile, Part, PartRemoved
from pipeline.storage.files import Interrupted, read_cached, read_fully
from pipeline.storage.remote_client import NoRanges, Remote, RemoteError, no_ranges
from shards.errors import StorageFailed
from shards.files.retry import WarningThrottle
from shards.files.waiting import Wait

log = logging.getLogger(__name__)

STAGING_THREADS = 4
CHUNK = 8 << 20  # bytes of an interrupted download that are hashed at once
NO_ROOM_SECONDS = 60.0
"""How long a sample waits for room in the cache where it cannot be read past the cache."""
VERSIONS = 3  # times that a file is fetched anew when its bytes do not match its hash
# Files leased at once; each is a file descriptor. Others stay in the cache as long as there is room.
MAX_LEASES = 400
# Looked ahead at once: a set of few shards needs the same ones again and again, to the last epoch.
MAX_NEEDS = 1024
_LOOK_AGAIN_SECONDS = 0.2
_FULL_SECONDS = 5.0
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


def whole(name: str, size: int, digest: str) -> StagedFile:
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
    other = _OtherProcess(file)
    while isinstance(lease := stage(file, remote, cache, folder), Busy):
        other.pause(lease)
    return lease


class _OtherProcess:
    """The wait for another process that fetches a file."""

    def __init__(self, file: StagedFile) -> None:
        self._file, self._progress = file, _Progress()
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


class _Progress:
    """Tracks the progress of another process that fetches a file."""

    def __init__(self) -> None:
        self._done, self._since = -1, time.monotonic()

    def stalled(self, busy: Busy) -> bool:
        """Whether it has had the same number of bytes for `STALLED_SECONDS`."""
        if busy.done != self._done:
            self._done, self._since = busy.done, time.monotonic()
        return time.monotonic() - self._since > STALLED_SECONDS


def _fetch(file: StagedFile, remote: Remote, part: Part) -> str:
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


class StagedFiles:
    """A split's files, some here and some still on the server (see `pipeline.storage.files.ShardFiles`).

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
        self._progress: dict[int, _Progress] = {}  # of other processes that fetch a file
        self._said: set[str] = set()
        self._full_until = 0.0
        self._no_room = WarningThrottle()
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
            NoRanges: the server sends whole files only, and the cache has no room for this one.
            RemoteError: staging of any file, or this read, has failed for good.
        """
        with self._leased(file) as handle:
            if handle is None and self._remote.has_ranges(self._files[file].source):
                try:
                    return self._read_there(self._files[file], target, offset)
                except NoRanges:  # of this file, though of others
                    pass
            here = self._stage_first(file) if handle is None else handle
            read_fully(here, target, offset, self._folder / self._files[file].name)

    def read_now(self, file: int, target: NDArray[np.uint8], offset: int) -> bool:
        with self._leased(file) as handle:
            return handle is not None and read_cached(handle, target, offset)

    def random_access(self) -> bool:
        return self._remote.has_ranges(self._files[0].source)

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
        target[:] = np.frombuffer(self._remote.read(entry.source, start, start + len(target)), np.uint8)

    def _stage_first(self, file: int) -> int:
        """Wait until a file is staged whose samples cannot be read before; returns its lease, which the caller uses.

        Raises:
            NoRanges: there is no room for it in the cache.
        """
        entry = self._files[file]
        other, no_room_until = _OtherProcess(entry), 0.0
        while True:
            with self._change:
                if self._failure is not None:
                    raise self._failure
                self._check_interrupt()
                if file in self._leases:
                    return self._leases[file]
                mine = file not in self._under_way
                self._under_way.add(file)
            lease: int | Busy | None = None
            try:
                if mine:
                    lease = self._stage(file)
            except CacheFull as error:
                if not no_room_until:
                    no_room_until = time.monotonic() + NO_ROOM_SECONDS
                    if self._no_room.due():
                        log.warning("%s; waiting for room for at most %.0f s", error, NO_ROOM_SECONDS)
                if entry.bytes > self._cache.limit or time.monotonic() > no_room_until:
                    raise NoRanges(f"{no_ranges(self._remote.url)} ({error})") from error
            if isinstance(lease, int):
                return lease
            if lease is None:  # a staging thread is at it, and ends by itself; or there is no room yet
                time.sleep(_LOOK_AGAIN_SECONDS)
            else:
                other.pause(lease, _LOOK_AGAIN_SECONDS)

    def _stage(self, file: int) -> int | Busy:
        """Stage a file that is under way here; see `stage`."""
        try:
            lease = stage(
                self._files[file], self._remote, self._cache, self._folder, check_interrupt=self._check_interrupt
            )
            if isinstance(lease, int):
                with self._change:
                    self._leases[file] = lease
            return lease
        finally:
            with self._change:
                self._under_way.discard(file)

    def _look_ahead(self) -> None:
        """Want what is needed next, as far as the share of the cache goes."""
        while len(self._needs) < MAX_NEEDS:
            if self._next is None:
                self._next = next(self._upcoming, None)
                if self._next is None:
                    return
            needed = sum(self._files[file].bytes for file in self._next.shards)
            if self._remote.facts.sends_ranges is False and needed > self._cache.limit:
                # Otherwise each batch would fetch whole files that the previous batch has evicted.
                self._failure = NoRanges(
                    f"{no_ranges(self._remote.url)}; {needed:,} bytes are needed at a time, the cache may hold "
                    f"{self._cache.limit:,}"
                )
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
            lease: int | Busy | None = None
            later = _LOOK_AGAIN_SECONDS
            try:
                lease = stage(
                    self._files[file], self._remote, self._cache, self._folder, check_interrupt=self._check_interrupt
                )
            except CacheFull as error:
                self._say("full", f"{error}; what finds no room is read from the server sample by sample")
                self._full_until = time.monotonic() + _FULL_SECONDS
            except CacheLocked as error:
                self._say("lock", f"{error}; until then, samples are read from the server one by one")
                self._full_until = time.monotonic() + _FULL_SECONDS
            except ForeignFile as error:
                self._say(str(error), f"{error}; its samples are read from the server one by one")
                later = math.inf
            except Interrupted:
                return
            except BaseException as error:  # whatever it was, it belongs to the reader
                self._failure = error
                return
            if isinstance(lease, Busy) and self._progress.setdefault(file, _Progress()).stalled(lease):
                self._say(
                    "stalled",
                    f"{lease.path}: fetched by {lease.holder()}, which has stood at {lease.done:,} "
                    f"bytes for {STALLED_SECONDS:.0f} s; continue or end that process; until then, samples of this and "
                    "other such files are read from the server one by one",
                )
                later = _FULL_SECONDS
            with self._change:
                self._under_way.discard(file)
                if isinstance(lease, int):
                    self._progress.pop(file, None)
                    self._leases[file] = lease
                    self._let_go(file)  # in case the reader is past it meanwhile
                else:
                    self._not_before[file] = time.monotonic() + later

    def _check_interrupt(self) -> None:
        if self._closed:
            raise Interrupted

    def _say(self, what: str, message: str) -> None:
        """Log once per reason that samples are read from the server instead of the cache."""
        if self._remote.facts.sends_ranges is False:
            return  # then none are, and who waits for the file says why
        with self._change:
            said = what in self._said
            self._said.add(what)
        if not said:
            log.warning("%s", message)

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

"""The shards of a remote set, staged once per node into a cache, in the order in which the plan reads them.

The first batch does not wait for shards: a sample whose shard is not local yet is read directly from the server by a
range request. A cache that is too small therefore only reduces speed.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.plan import ShardRequest
from pipeline.storage.cache.cache import Cache
from pipeline.storage.cache.errors import CacheFull, ForeignFile
from pipeline.storage.cache.folder import END_PROCESS, CacheLocked
from pipeline.storage.cache.partial_file import Busy
from pipeline.storage.files import Interrupted, read_cached, read_fully
from pipeline.storage.remote.client import Remote
from pipeline.storage.remote.errors import NoRanges, no_ranges
from pipeline.storage.remote.shard_table import ShardTable
from pipeline.storage.remote.staging import STALLED_SECONDS, DownloadWait, StagedFile, stage
from shards.files.retry import WarningThrottle

log = logging.getLogger(__name__)

STAGING_THREADS = 4
NO_ROOM_SECONDS = 60.0
"""Timeout in seconds for free cache space, for servers without range requests."""
RETRY_SECONDS = 0.2
FULL_CACHE_SECONDS = 5.0
"""Pause in seconds before the next attempt to stage into a full or locked cache."""


class StagedFiles:
    """The shards of a split, some in the cache and some still on the server. Implements `ShardFiles`.

    Args:
        max_bytes: maximum total size of the cached files that this process may keep in use.
    """

    def __init__(
        self, files: Sequence[StagedFile], *, remote: Remote, cache: Cache, folder: Path, max_bytes: int
    ) -> None:
        self._files, self._remote, self._cache, self._folder = files, remote, cache, folder
        self._change = threading.Condition()
        self._shards = ShardTable(files, max_bytes=max_bytes)  # access requires the lock of `_change`
        self._logged: set[str] = set()
        self._full_until = 0.0
        self._no_room = WarningThrottle()
        self._failure: BaseException | None = None
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"staging-{i}", daemon=True) for i in range(STAGING_THREADS)
        ]

    def prefetch(self, requests: Iterator[ShardRequest]) -> None:
        """Start to stage the requested shards, in the order in which they will be read."""
        self._shards.prefetch(requests)
        self.advance(-1)
        for thread in self._threads:
            thread.start()

    def advance(self, step: int) -> None:
        """Release shards that only batches before `step` need, and request further ones."""
        with self._change:
            self._shards.drop_before(step)
            for needed in self._shards.look_ahead():
                if self._remote.facts.sends_ranges is False and needed > self._cache.limit:
                    # Otherwise each batch would download files that were evicted for the previous batch.
                    self._failure = NoRanges(
                        f"{no_ranges(self._remote.url)}; the shards that are read at the same time have {needed:,} "
                        f"bytes, the cache is limited to {self._cache.limit:,} bytes"
                    )
                    break
            self._change.notify_all()

    def read(self, file: int, target: NDArray[np.uint8], offset: int) -> None:
        """Fill `target` from the shard, in the cache or on the server.

        Raises:
            ShardSetError: the shard is too short.
            NoRanges: the server does not support range requests, and the cache has no space for the shard.
            RemoteError: this read, or staging of any shard, failed permanently.
        """
        with self._reading(file) as lease:
            if lease is None and self._remote.has_ranges(self._files[file].source):
                try:
                    return self._read_remote(self._files[file], target, offset)
                except NoRanges:  # the server supports ranges for other files, but not for this one
                    pass
            local = self._wait_until_local(file) if lease is None else lease
            read_fully(local, target, offset, self._folder / self._files[file].name)

    def read_if_cached(self, file: int, target: NDArray[np.uint8], offset: int) -> bool:
        with self._reading(file) as lease:
            return lease is not None and read_cached(lease, target, offset)

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
            self._shards.drop_before(math.inf)

    # -- reading -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _reading(self, file: int) -> Iterator[int | None]:
        """Yield the shard's lease, None if it is not LOCAL. The shard is not released while the block runs."""
        with self._change:
            if self._failure is not None:
                raise self._failure
            self._shards[file].readers += 1
            lease = self._shards.lease(file)
        try:
            yield lease
        finally:
            with self._change:
                self._shards[file].readers -= 1
                self._shards.release(file)

    def _read_remote(self, entry: StagedFile, target: NDArray[np.uint8], offset: int) -> None:
        start = entry.start + offset
        target[:] = np.frombuffer(self._remote.read(entry.source, start, start + len(target)), np.uint8)

    def _wait_until_local(self, file: int) -> int:
        """Stage a shard, or wait until it is staged, and return its lease. The caller is inside `_reading`.

        Raises:
            NoRanges: the cache has no space for the shard.
        """
        entry = self._files[file]
        other, no_room_until = DownloadWait(entry), 0.0
        while True:
            with self._change:
                if self._failure is not None:
                    raise self._failure
                self._check_interrupt()
                if (local := self._shards.lease(file)) is not None:
                    return local
                begun = self._shards.begin(file)
            lease: int | Busy | None = None
            try:
                lease = self._stage(file) if begun else None
            except CacheFull as error:
                if not no_room_until:
                    no_room_until = time.monotonic() + NO_ROOM_SECONDS
                    if self._no_room.due():
                        log.warning("%s; waiting up to %.0f s for free cache space", error, NO_ROOM_SECONDS)
                if entry.bytes > self._cache.limit or time.monotonic() > no_room_until:
                    raise NoRanges(f"{no_ranges(self._remote.url)} ({error})") from error
            finally:
                if begun:
                    with self._change:
                        self._shards.end(file, lease)
            if isinstance(lease, Busy):
                other.pause(lease, RETRY_SECONDS)
            elif lease is None:  # a staging thread is downloading the shard, or the cache is full
                time.sleep(RETRY_SECONDS)

    # -- staging threads -----------------------------------------------------------------------------------------

    def _work(self) -> None:
        """Stage requested shards until the reader is closed or staging fails permanently."""
        while (file := self._choose()) is not None:
            lease: int | Busy | None = None
            retry_at = time.monotonic() + RETRY_SECONDS
            try:
                lease = self._stage(file)
            except CacheFull as error:
                self._log_once(
                    "full", f"{error}; samples of shards that do not fit are read individually from the server (slower)"
                )
                self._full_until = time.monotonic() + FULL_CACHE_SECONDS
            except CacheLocked as error:
                self._log_once(
                    "lock", f"{error}; until then, samples are read individually from the server (slower)"
                )
                self._full_until = time.monotonic() + FULL_CACHE_SECONDS
            except ForeignFile as error:
                self._log_once(
                    str(error), f"{error}; samples of this shard are read individually from the server (slower)"
                )
                retry_at = math.inf
            except Interrupted:
                return
            except BaseException as error:  # the next read raises the error
                self._failure = error
                return
            if isinstance(lease, Busy) and self._shards[file].progress.stalled(lease):
                self._log_once(
                    "stalled",
                    f"{lease.path}: being downloaded by {lease.holder()}, which has made no progress beyond "
                    f"{lease.done:,} bytes for {STALLED_SECONDS:.0f} s; {END_PROCESS}; until then, samples of this and "
                    "any other such shard are read individually from the server (slower)",
                )
                retry_at = time.monotonic() + FULL_CACHE_SECONDS
            with self._change:
                self._shards.end(file, lease, retry_at=retry_at)

    def _choose(self) -> int | None:
        """Wait for the next shard to stage; None when the reader is closed or has failed."""
        with self._change:
            while not self._closed and self._failure is None:
                now = time.monotonic()
                file = self._shards.next_to_stage(now) if now > self._full_until else None
                if file is not None:
                    return file
                self._change.wait(RETRY_SECONDS)
            return None

    def _stage(self, file: int) -> int | Busy:
        return stage(self._files[file], self._remote, self._cache, self._folder, check_interrupt=self._check_interrupt)

    def _check_interrupt(self) -> None:
        if self._closed:
            raise Interrupted

    def _log_once(self, reason: str, message: str) -> None:
        """Warn, once per reason, that samples are read from the server instead of the cache."""
        if self._remote.facts.sends_ranges is False:
            return  # samples cannot be read individually; the read that waits for the shard raises the error
        with self._change:
            logged = reason in self._logged
            self._logged.add(reason)
        if not logged:
            log.warning("%s", message)

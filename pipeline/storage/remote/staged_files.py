"""The shards of a remote set: staged once per node into a cache, those that the plan reads next first.

The first batch waits for no shard: a sample whose shard is not local yet is read from the server directly, as a range
of bytes. So a cache that is too small costs speed, and nothing else.
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
from pipeline.storage.cache.folder import CacheLocked
from pipeline.storage.cache.partial_file import Busy
from pipeline.storage.files import Interrupted, read_cached, read_fully
from pipeline.storage.remote.client import Remote
from pipeline.storage.remote.errors import NoRanges, no_ranges
from pipeline.storage.remote.shard_table import ShardTable
from pipeline.storage.remote.staging import STALLED_SECONDS, OtherProcess, StagedFile, stage
from shards.files.retry import WarningThrottle

log = logging.getLogger(__name__)

STAGING_THREADS = 4
NO_ROOM_SECONDS = 60.0
"""How long a sample waits for room in the cache where it cannot be read past the cache."""
RETRY_SECONDS = 0.2
FULL_CACHE_SECONDS = 5.0


class StagedFiles:
    """A split's shards, some local and some still on the server (see `pipeline.storage.files.ShardFiles`).

    Args:
        share: bytes of the cache that this process may hold at once.
    """

    def __init__(self, files: Sequence[StagedFile], *, remote: Remote, cache: Cache, folder: Path, share: int) -> None:
        self._files, self._remote, self._cache, self._folder = files, remote, cache, folder
        self._change = threading.Condition()
        self._shards = ShardTable(files, share=share)  # used with the lock of `_change` held
        self._logged: set[str] = set()
        self._full_until = 0.0
        self._no_room = WarningThrottle()
        self._failure: BaseException | None = None
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"staging-{i}", daemon=True) for i in range(STAGING_THREADS)
        ]

    def prefetch(self, requests: Iterator[ShardRequest]) -> None:
        """Begin to stage what will be read, in this order."""
        self._shards.prefetch(requests)
        self.advance(-1)
        for thread in self._threads:
            thread.start()

    def advance(self, step: int) -> None:
        """Release what only batches before `step` have read, and look further ahead."""
        with self._change:
            self._shards.drop_before(step)
            for needed in self._shards.look_ahead():
                if self._remote.facts.sends_ranges is False and needed > self._cache.limit:
                    # Otherwise each batch would fetch whole files that the previous batch has evicted.
                    self._failure = NoRanges(
                        f"{no_ranges(self._remote.url)}; {needed:,} bytes are needed at a time, the cache may hold "
                        f"{self._cache.limit:,}"
                    )
                    break
            self._change.notify_all()

    def read(self, file: int, target: NDArray[np.uint8], offset: int) -> None:
        """Fill `target` from the shard, wherever it is.

        Raises:
            ShardSetError: the shard ends before.
            NoRanges: the server sends whole files only, and the cache has no room for this one.
            RemoteError: staging of any shard, or this read, has failed for good.
        """
        with self._reading(file) as lease:
            if lease is None and self._remote.has_ranges(self._files[file].source):
                try:
                    return self._read_remote(self._files[file], target, offset)
                except NoRanges:  # of this file, though of others
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
        """Yield the shard's lease, None if it is not LOCAL; no lease of it is given back while the block runs."""
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
        """Stage a shard whose samples cannot be read before; returns its lease, for a caller in `_reading`.

        Raises:
            NoRanges: there is no room for it in the cache.
        """
        entry = self._files[file]
        other, no_room_until = OtherProcess(entry), 0.0
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
                        log.warning("%s; waiting for room for at most %.0f s", error, NO_ROOM_SECONDS)
                if entry.bytes > self._cache.limit or time.monotonic() > no_room_until:
                    raise NoRanges(f"{no_ranges(self._remote.url)} ({error})") from error
            finally:
                if begun:
                    with self._change:
                        self._shards.end(file, lease)
            if isinstance(lease, Busy):
                other.pause(lease, RETRY_SECONDS)
            elif lease is None:  # a staging thread is at it, and ends by itself; or there is no room yet
                time.sleep(RETRY_SECONDS)

    # -- staging threads -----------------------------------------------------------------------------------------

    def _work(self) -> None:
        """Stage what is requested, until the reader is closed or staging has failed for good."""
        while (file := self._choose()) is not None:
            lease: int | Busy | None = None
            retry_at = time.monotonic() + RETRY_SECONDS
            try:
                lease = self._stage(file)
            except CacheFull as error:
                self._log_once("full", f"{error}; what finds no room is read from the server sample by sample")
                self._full_until = time.monotonic() + FULL_CACHE_SECONDS
            except CacheLocked as error:
                self._log_once("lock", f"{error}; until then, samples are read from the server one by one")
                self._full_until = time.monotonic() + FULL_CACHE_SECONDS
            except ForeignFile as error:
                self._log_once(str(error), f"{error}; its samples are read from the server one by one")
                retry_at = math.inf
            except Interrupted:
                return
            except BaseException as error:  # whatever it was, it belongs to the reader
                self._failure = error
                return
            if isinstance(lease, Busy) and self._shards[file].progress.stalled(lease):
                self._log_once(
                    "stalled",
                    f"{lease.path}: fetched by {lease.holder()}, which has stood at {lease.done:,} "
                    f"bytes for {STALLED_SECONDS:.0f} s; continue or end that process; until then, samples of this and "
                    "other such files are read from the server one by one",
                )
                retry_at = time.monotonic() + FULL_CACHE_SECONDS
            with self._change:
                self._shards.end(file, lease, retry_at=retry_at)

    def _choose(self) -> int | None:
        """Wait for a shard to stage, the one that is read first; None when there is nothing more to do."""
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
        """Warn once per reason that samples are read from the server instead of the cache."""
        if self._remote.facts.sends_ranges is False:
            return  # then none are, and the read that waits for the shard raises an error that says why
        with self._change:
            logged = reason in self._logged
            self._logged.add(reason)
        if not logged:
            log.warning("%s", message)

"""Sample ids -> encoded bytes, read ahead in threads and checked against the index's hashes.

Bytes are read with `preadv` into one buffer per batch, through a bounded cache of file descriptors. No memory maps: a
map whose file is truncated is a SIGBUS, network file systems punish page faults, and thousands of shards exhaust them.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from pipeline.plan import Ids
from shards.dataset import ShardSet
from shards.errors import ShardSetError

T = TypeVar("T")

MAX_OPEN_SHARDS = 256
READ_THREADS = 4
# Samples per task: enough to amortise the hand-over, few enough that one batch keeps every thread busy.
SAMPLES_PER_TASK = 16


@dataclass(frozen=True)
class Encoded:
    """The encoded images of one batch."""

    ids: Ids
    """int64 [n]."""
    jpegs: list[NDArray[np.uint8]]
    """n arrays of uint8 [bytes], views into one buffer."""
    rows: NDArray[np.void]
    """INDEX_DTYPE [n]: label, height, width and the rest, copied from the index."""


class SampleReader:
    """Reads batches of one split. Thread-safe; close it, or use it as a context manager.

    Args:
        dataset: the open set.
        split: its split to read.
        threads: reading threads.
        check: verify each sample's hash (xxh3-64, about 10 GB/s per core).
    """

    def __init__(
        self,
        dataset: ShardSet,
        split: str,
        *,
        threads: int = READ_THREADS,
        check: bool = True,
        max_open: int = MAX_OPEN_SHARDS,
    ) -> None:
        self.index = dataset.index(split)
        self._paths = [dataset.shard_path(split, shard) for shard in range(len(dataset.split(split).shards))]
        self._check = check
        self._files = _OpenFiles(max_open)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="shard-reader")

    def read(self, ids: Ids) -> Encoded:
        """Read one batch and wait for it.

        Raises:
            ShardSetError: a shard is missing or truncated, or a sample's bytes do not match its hash.
        """
        return self._gather(*self._start(ids))

    def read_ahead(self, batches: Iterable[tuple[Ids, T]], ahead: int) -> Iterator[tuple[Encoded, T]]:
        """Read a stream of (ids, anything) in order, keeping up to `ahead` batches under way."""
        under_way: deque[tuple[tuple[Encoded, list[Future[None]]], T]] = deque()
        try:
            for ids, extra in batches:
                under_way.append((self._start(ids), extra))
                if len(under_way) > ahead:
                    yield self._finish(under_way.popleft())
            while under_way:
                yield self._finish(under_way.popleft())
        finally:
            for (_, tasks), _ in under_way:
                for task in tasks:
                    task.cancel()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._files.close()

    def __enter__(self) -> SampleReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, ids: Ids) -> tuple[Encoded, list[Future[None]]]:
        rows = self.index[ids]
        ends = np.cumsum(rows["size"], dtype=np.int64)
        buffer = np.empty(int(ends[-1]) if len(ends) else 0, np.uint8)
        jpegs = np.split(buffer, ends[:-1])
        batch = Encoded(ids=ids, jpegs=jpegs, rows=rows)
        # Neighbours in storage are read by one task: sorting by place makes them neighbours here.
        by_place = np.lexsort((rows["offset"], rows["shard"]))
        tasks = [
            self._pool.submit(self._read_some, batch, by_place[start : start + SAMPLES_PER_TASK])
            for start in range(0, len(ids), SAMPLES_PER_TASK)
        ]
        return batch, tasks

    def _finish(self, started: tuple[tuple[Encoded, list[Future[None]]], T]) -> tuple[Encoded, T]:
        (batch, tasks), extra = started
        return self._gather(batch, tasks), extra

    @staticmethod
    def _gather(batch: Encoded, tasks: list[Future[None]]) -> Encoded:
        for task in tasks:
            task.result()
        return batch

    def _read_some(self, batch: Encoded, places: NDArray[np.int64]) -> None:
        rows = batch.rows[places]
        shards, offsets, hashes = rows["shard"].tolist(), rows["offset"].tolist(), rows["hash"].tolist()
        for place, shard, offset, expected in zip(places.tolist(), shards, offsets, hashes, strict=True):
            target = batch.jpegs[place]
            with self._files.open(self._paths[shard]) as handle:
                _read_fully(handle, target, offset, self._paths[shard])
            if self._check and xxh3_64_intdigest(target) != expected:
                raise ShardSetError(
                    f"{self._paths[shard]}: the {len(target)} bytes at offset {offset} (sample {batch.ids[place]}) "
                    "are not the ones that were sharded: their hash differs; run 'pipeline verify' on the set, then "
                    "copy the shard again"
                )


def _read_fully(handle: int, target: NDArray[np.uint8], offset: int, path: Path) -> None:
    """Fill `target` from `offset`; preadv may deliver less than asked for."""
    view, done = memoryview(target.data), 0
    while done < len(view):
        got = os.preadv(handle, [view[done:]], offset + done)
        if got == 0:
            raise ShardSetError(
                f"{path}: ends at byte {offset + done}, inside a sample of {len(view)} bytes at {offset}: truncated; "
                "copy the shard again"
            )
        done += got


class _OpenFiles:
    """A bounded cache of file descriptors, least recently used out first; those in use are never closed."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._handles: OrderedDict[Path, int] = OrderedDict()
        self._users: dict[Path, int] = {}

    @contextlib.contextmanager
    def open(self, path: Path) -> Iterator[int]:
        handle = self._acquire(path)
        try:
            yield handle
        finally:
            with self._lock:
                self._users[path] -= 1
                self._shrink()

    def close(self) -> None:
        with self._lock:
            for handle in self._handles.values():
                os.close(handle)
            self._handles.clear()
            self._users.clear()

    def _acquire(self, path: Path) -> int:
        with self._lock:
            if path not in self._handles:
                try:
                    self._handles[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                except FileNotFoundError:
                    raise ShardSetError(
                        f"{path}: missing; copy it again, or run 'pipeline verify' on the set"
                    ) from None
                except OSError as error:
                    raise ShardSetError(f"{path}: cannot be opened ({error.strerror})") from error
            self._handles.move_to_end(path)
            self._users[path] = self._users.get(path, 0) + 1
            return self._handles[path]

    def _shrink(self) -> None:
        for path in [p for p, users in self._users.items() if users == 0]:
            if len(self._handles) <= self._limit:
                return
            os.close(self._handles.pop(path))
            del self._users[path]

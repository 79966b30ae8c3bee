"""Read the encoded bytes of samples by id, ahead of time in threads, and verify them by the hashes in the index."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from pipeline.options import LoaderSettings
from pipeline.plan import Ids, ShardRequest
from pipeline.stage_trace import WAIT_FOR_READ, StageTrace
from pipeline.storage.buffer_pool import BufferPool
from pipeline.storage.memory_cache.shared_pixels import StoredFlags
from pipeline.storage.placement import SampleLocations, Storage
from shards.errors import ShardSetError, StorageFailed

T = TypeVar("T")

Sample = tuple[int, int, int, int | None]
"""A sample to read: row in the batch, file number, offset in bytes, expected hash (None: not verified)."""

# Number of threads that start batches and read from the page cache. More threads do not make these reads faster.
BATCH_THREADS = 2
# Number of samples per task: enough to amortize a task's overhead, few enough that a small batch uses many threads.
SAMPLES_PER_TASK = 8

# Number of attempts to read a sample with the right hash: its bytes may have been damaged in transfer.
READ_ATTEMPTS = 2


@dataclass(frozen=True)
class Fault:
    """A bad sample: its file is missing or truncated, or its bytes do not have the hash in the index."""

    row: int
    id: int
    error: ShardSetError


@dataclass(frozen=True)
class Encoded:
    """The encoded images of one batch."""

    ids: Ids
    """Sample ids, int64 [n]."""
    images: list[NDArray[np.uint8]]
    """n arrays of uint8 [bytes], views into one buffer: JPEGs, or pixels if `raw`."""
    rows: NDArray[np.void]
    """Index entries (INDEX_DTYPE [n]: label, height, width, ...), copied."""
    raw: NDArray[np.bool_]
    """bool [n]. True: pixels, uint8 [height x width x 3]; False: a JPEG."""
    faults: list[Fault] = field(default_factory=list)
    """Bad samples. The bytes of their rows must not be used."""
    stored: NDArray[np.bool_] | None = None
    """bool [n]. True: not read, because the memory cache has the pixels; the image is empty. None: no cache."""

    def checked(self) -> Encoded:
        """Return the batch if all rows are good.

        Raises:
            ShardSetError: the error of the first bad row.
        """
        if self.faults:
            raise min(self.faults, key=lambda fault: fault.row).error
        return self


Started = tuple[Encoded, list[Future[None]]]
"""A batch and the tasks that are still reading it."""


class SampleReader:
    """Reads batches of one split. Thread-safe; close it, or use it as a context manager.

    Args:
        storage: index and files of the split; closed with the reader.
        threads: number of reading threads.
        check: verify each sample's hash (xxh3-64, several GB/s per core).
        buffers: pool of the buffers to read into; None: a new pool of pageable memory.
        trace: records reads, waits for them and the number of batches that have been read.
        stored: samples that the memory cache has, which are not read. None: no cache.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        threads: int = LoaderSettings.read_threads,
        check: bool = True,
        buffers: BufferPool | None = None,
        trace: StageTrace | None = None,
        stored: StoredFlags | None = None,
    ) -> None:
        self._storage, self._check, self._stored = storage, check, stored
        self._buffers = BufferPool() if buffers is None else buffers
        self._trace = trace or StageTrace()
        self._pending: deque[tuple[int, Future[Started]]] = deque()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="shard-reader")
        self._batches = ThreadPoolExecutor(BATCH_THREADS, thread_name_prefix="batch-reader")

    def read(self, ids: Ids) -> Encoded:
        """Read one batch and wait for it; bad samples are listed in its `faults`.

        Raises:
            StorageFailed: the storage failed, possibly only temporarily.
        """
        return _gather(*self._start(ids))

    def read_ahead(self, batches: Iterable[tuple[Ids, T]], ahead: int) -> Iterator[tuple[Encoded, T]]:
        """Read a stream of (ids, any object) in order, up to `ahead` batches before the consumer requests them.

        Pending reads of a generator that is not exhausted end when the reader is closed.
        """
        self._pending.clear()
        extras: deque[T] = deque()
        for number, (ids, extra) in enumerate(batches):
            started = self._batches.submit(self._trace.call, "read", number, self._start, ids, number)
            self._pending.append((number, started))
            self._trace.level_when_done("read", [started], self._count_read)
            extras.append(extra)
            if len(extras) > ahead:
                yield self._next_read(), extras.popleft()
        while extras:
            yield self._next_read(), extras.popleft()

    def prefetch(self, requests: Iterator[ShardRequest]) -> None:
        """Start to fetch remote shards in the order in which they will be read. Call at most once."""
        self._storage.files.prefetch(requests)

    def advance(self, step: int) -> None:
        """Mark all batches before `step` as read."""
        self._storage.files.advance(step)

    def ids_of_class(self, label: int) -> Ids:
        """Return the ids of all samples of a class, ascending."""
        return np.flatnonzero(self._storage.index["label"] == label)

    def random_access(self) -> bool:
        """Return whether single samples can be read without the rest of their file."""
        return self._storage.files.random_access()

    def file_of(self, shard: int) -> str:
        """Return the path or URL of a shard's file, for messages."""
        return self._storage.files.name(0 if self._storage.one_file else shard)

    def interrupt(self) -> None:
        """Make waiting reads and all later reads raise `Interrupted`."""
        self._storage.files.interrupt()

    def close(self) -> None:
        self.interrupt()
        self._batches.shutdown()
        self._pool.shutdown()
        self._storage.files.close()

    def __enter__(self) -> SampleReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _next_read(self) -> Encoded:
        """Wait for the first pending batch."""
        number, started = self._pending.popleft()
        encoded = self._trace.call(WAIT_FOR_READ, number, lambda: _gather(*started.result()))
        if self._trace.recording:
            self._trace.level("read", self._count_read())
        return encoded

    def _count_read(self) -> int:
        """Return the number of pending batches that have been read."""
        # A copy, because another thread may change the queue.
        return sum(_is_read(started) for _, started in list(self._pending))

    def _start(self, ids: Ids, number: int | None = None) -> Started:
        """Read samples that are in the page cache, and submit tasks that read the remaining samples.

        Reading from the page cache in more threads would not be faster: they would wait for the interpreter lock.
        """
        locations = self._storage.locate(ids)
        stored = None if self._stored is None else self._stored.stored(ids)
        sizes = locations.sizes if stored is None else np.where(stored, 0, locations.sizes)
        buffer = self._buffers.bytes(int(sizes.sum()))
        images = [buffer[start:end] for start, end in pairwise([0, *np.cumsum(sizes).tolist()])]
        batch = Encoded(ids=ids, images=images, rows=locations.rows, raw=locations.raw, stored=stored)
        read_if_cached = self._storage.files.read_if_cached
        # Sort by location, so that one task reads samples that are stored next to each other.
        by_location = np.lexsort((locations.offsets, locations.files))
        if stored is not None:
            by_location = by_location[~stored[by_location]]
        waiting = []
        for sample in self._samples(locations, by_location):
            row, file, offset, expected = sample
            if not (read_if_cached(file, images[row], offset) and _has_hash(images[row], expected)):
                waiting.append(sample)
        tasks = [
            self._pool.submit(self._trace.call, "read", number, self._read_some, batch, part)
            for part in (waiting[at : at + SAMPLES_PER_TASK] for at in range(0, len(waiting), SAMPLES_PER_TASK))
        ]
        self._trace.level_when_done("read", tasks, self._count_read)
        return batch, tasks

    def _samples(self, locations: SampleLocations, order: NDArray[np.int64]) -> list[Sample]:
        hashes = locations.rows["hash"].tolist()
        if not self._check:
            hashes = [None] * len(hashes)
        files, offsets = locations.files.tolist(), locations.offsets.tolist()
        return [(row, files[row], offsets[row], hashes[row]) for row in order.tolist()]

    def _read_some(self, batch: Encoded, samples: list[Sample]) -> None:
        for row, file, offset, expected in samples:
            target = batch.images[row]
            try:
                for _ in range(READ_ATTEMPTS):
                    self._storage.files.read(file, target, offset)
                    if _has_hash(target, expected):
                        break
                else:
                    raise ShardSetError(
                        f"{self._storage.files.name(file)}: the {len(target)} bytes at offset {offset} are damaged: "
                        "their hash differs from the index; run 'pipeline verify' on the set"
                    )
            except StorageFailed as error:  # the sample may be undamaged, so it must not be replaced
                raise StorageFailed(f"{error} (sample {batch.ids[row]})") from error
            except ShardSetError as error:
                sample, key = int(batch.ids[row]), self._storage.key(file, offset)
                which = f"sample {sample}" if key is None else f"sample {sample}, key {key}"
                batch.faults.append(Fault(row, sample, ShardSetError(f"{error} ({which})")))


def _has_hash(image: NDArray[np.uint8], expected: int | None) -> bool:
    return expected is None or xxh3_64_intdigest(image) == expected  # type: ignore[arg-type]


def _is_read(started: Future[Started]) -> bool:
    # Started reads that failed are not counted: the consumer raises their error.
    return started.done() and not started.exception() and all(task.done() for task in started.result()[1])


def _gather(batch: Encoded, tasks: list[Future[None]]) -> Encoded:
    for task in tasks:
        task.result()
    return batch

"""Sample ids -> encoded bytes, read ahead in threads and checked against the index's hashes."""

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
from pipeline.storage.buffer_pool import BufferPool
from pipeline.storage.placement import SampleLocations, Storage
from shards.errors import ShardSetError, StorageFailed

T = TypeVar("T")

Sample = tuple[int, int, int, int | None]
"""Row in the batch, file, offset, and the hash of its bytes (None = not to be checked)."""

# Batches that are begun at once. What is in the page cache is read there and then, by as many threads as gain by it.
BATCH_THREADS = 2
# Samples per task: enough to amortise the hand-over, few enough that a small batch keeps many threads busy.
SAMPLES_PER_TASK = 8

# Of a sample whose bytes are wrong: they may have been damaged on the way here.
READINGS = 2


@dataclass(frozen=True)
class Fault:
    """A sample whose file is missing or ends before it, or whose bytes are not the ones that were sharded."""

    row: int
    id: int
    error: ShardSetError


@dataclass(frozen=True)
class Encoded:
    """The encoded images of one batch."""

    ids: Ids
    """int64 [n]."""
    images: list[NDArray[np.uint8]]
    """n arrays of uint8 [bytes], views into one buffer: JPEGs, or pixels where `raw`."""
    rows: NDArray[np.void]
    """INDEX_DTYPE [n]: label, height, width and the rest, copied from the index."""
    raw: NDArray[np.bool_]
    """bool [n]: stored as pixels, uint8 [height x width x 3] (a .beton may)."""
    faults: list[Fault] = field(default_factory=list)
    """Rows whose bytes are worthless."""

    def checked(self) -> Encoded:
        """Itself, if all rows are good.

        Raises:
            ShardSetError: what is wrong with the first bad row.
        """
        if self.faults:
            raise min(self.faults, key=lambda fault: fault.row).error
        return self


Started = tuple[Encoded, list[Future[None]]]
"""A batch, and who still reads for it."""


class SampleReader:
    """Reads batches of one split. Thread-safe; close it, or use it as a context manager.

    Args:
        storage: where the samples are; closed with the reader.
        threads: reading threads.
        check: verify each sample's hash (xxh3-64, several GB/s per core).
        buffers: memory to read into; None = ordinary memory.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        threads: int = LoaderSettings.read_threads,
        check: bool = True,
        buffers: BufferPool | None = None,
    ) -> None:
        self._storage, self._check = storage, check
        self._buffers = BufferPool() if buffers is None else buffers
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="shard-reader")
        self._batches = ThreadPoolExecutor(BATCH_THREADS, thread_name_prefix="batch-reader")

    def read(self, ids: Ids) -> Encoded:
        """Read one batch and wait for it; samples that are missing or damaged are in its `faults`.

        Raises:
            StorageFailed: storage failed, which may have passed by another start.
        """
        return _gather(*self._start(ids))

    def read_ahead(self, batches: Iterable[tuple[Ids, T]], ahead: int) -> Iterator[tuple[Encoded, T]]:
        """Read a stream of (ids, anything) in order, up to `ahead` batches before they are asked for.

        Reads that are still under way when the consumer leaves end when the reader is closed.
        """
        under_way: deque[tuple[Future[Started], T]] = deque()
        for ids, extra in batches:
            under_way.append((self._batches.submit(self._start, ids), extra))
            if len(under_way) > ahead:
                started, first = under_way.popleft()
                yield _gather(*started.result()), first
        while under_way:
            started, first = under_way.popleft()
            yield _gather(*started.result()), first

    def prefetch(self, requests: Iterator[ShardRequest]) -> None:
        """Shards that will be read, in order; those on a server are then fetched beforehand. To be told once."""
        self._storage.files.prefetch(requests)

    def advance(self, step: int) -> None:
        """All batches before `step` have been read."""
        self._storage.files.advance(step)

    def random_access(self) -> bool:
        """Return whether single samples can be read without the rest of their file."""
        return self._storage.files.random_access()

    def file_of(self, shard: int) -> str:
        """The file of a shard, for messages."""
        return self._storage.files.name(0 if self._storage.one_file else shard)

    def interrupt(self) -> None:
        """Let whoever waits for bytes go: what is under way ends with an error."""
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

    def _start(self, ids: Ids) -> Started:
        """Read what is in the page cache at once, and have the threads read the rest.

        Threads that have nothing to wait for mostly wait for each other (the interpreter's lock): what is in the page
        cache is not worth handing out.
        """
        places = self._storage.locate(ids)
        buffer = self._buffers.bytes(int(places.sizes.sum()))
        images = [buffer[start:end] for start, end in pairwise([0, *np.cumsum(places.sizes).tolist()])]
        batch = Encoded(ids=ids, images=images, rows=places.rows, raw=places.raw)
        read_if_cached = self._storage.files.read_if_cached
        # Neighbours in storage are read by one task: sorting by place makes them neighbours here.
        by_place = np.lexsort((places.offsets, places.files))
        waiting = []
        for sample in self._samples(places, by_place):
            row, file, offset, expected = sample
            if not (read_if_cached(file, images[row], offset) and _is_good(images[row], expected)):
                waiting.append(sample)
        tasks = [
            self._pool.submit(self._read_some, batch, waiting[start : start + SAMPLES_PER_TASK])
            for start in range(0, len(waiting), SAMPLES_PER_TASK)
        ]
        return batch, tasks

    def _samples(self, places: SampleLocations, order: NDArray[np.int64]) -> list[Sample]:
        hashes = places.rows["hash"].tolist()
        if not self._check:
            hashes = [None] * len(hashes)
        files, offsets = places.files.tolist(), places.offsets.tolist()
        return [(row, files[row], offsets[row], hashes[row]) for row in order.tolist()]

    def _read_some(self, batch: Encoded, samples: list[Sample]) -> None:
        for row, file, offset, expected in samples:
            target = batch.images[row]
            try:
                for _ in range(READINGS):
                    self._storage.files.read(file, target, offset)
                    if _is_good(target, expected):
                        break
                else:
                    raise ShardSetError(
                        f"{self._storage.files.name(file)}: the {len(target)} bytes at offset {offset} are not the "
                        "ones that were sharded: their hash differs; run 'pipeline verify' on the set"
                    )
            except StorageFailed as error:  # says nothing about the sample, so nothing may take its place
                raise StorageFailed(f"{error} (sample {batch.ids[row]})") from error
            except ShardSetError as error:
                sample, key = int(batch.ids[row]), self._storage.key(file, offset)
                which = f"sample {sample}" if key is None else f"sample {sample}, key {key}"
                batch.faults.append(Fault(row, sample, ShardSetError(f"{error} ({which})")))


def _is_good(image: NDArray[np.uint8], expected: int | None) -> bool:
    return expected is None or xxh3_64_intdigest(image) == expected  # type: ignore[arg-type]


def _gather(batch: Encoded, tasks: list[Future[None]]) -> Encoded:
    for task in tasks:
        task.result()
    return batch

"""Replace the samples that the memory cache keeps by their pixels, and decode those that it does not have yet.

A sample that the cache keeps is always decoded as a whole, shrunk and stored, and its crop window is cut out of the
stored pixels. It therefore has the same pixels when it is decoded and when it is found in the cache.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import simplejpeg

from pipeline.decode.job import DecodeError, DecodeJob
from pipeline.decode.resize import Pixels, resized
from pipeline.plan import Ids
from pipeline.stage_trace import WAIT_FOR_DECODE, StageTrace
from pipeline.storage.memory_cache.layout import scaled_windows
from pipeline.storage.memory_cache.shared_pixels import SharedPixels
from shards.errors import first_line

T = TypeVar("T")

IMAGES_PER_TASK = 4


@dataclass
class CacheUse:
    """Number of samples that a loader has prepared for decoding, and where their pixels came from."""

    samples: int = 0
    hits: int = 0
    """Samples whose pixels the cache had: they were neither read nor decoded."""
    stored_bytes: int = 0
    """Bytes of the images that all processes of this node have stored."""


@dataclass
class CachedPixels:
    """A stage before the decoder that replaces samples by the pixels in the memory cache.

    Args:
        cache: the memory cache.
        threads: threads that decode samples to store them.
        ahead: number of batches for which this happens concurrently.
        fast_dct: use the fast inverse DCT, as FFCV does; False: the accurate one, as DALI does on a CPU.
        trace: records the decoding and the waits for it.
    """

    cache: SharedPixels
    threads: int
    ahead: int
    fast_dct: bool = False
    trace: StageTrace = field(default_factory=StageTrace)
    use: CacheUse = field(default_factory=CacheUse)

    def run(self, jobs: Iterable[tuple[DecodeJob, T]]) -> Generator[tuple[DecodeJob, T], None, None]:
        """Yield the jobs in order, in which the samples that the cache keeps are pixels.

        Raises:
            DecodeError: a sample could not be decoded.
        """
        started: deque[tuple[int, list[Future[None]], DecodeJob, T]] = deque()

        def next_job() -> tuple[DecodeJob, T]:
            number, tasks, job, extra = started.popleft()
            with self.trace.span(WAIT_FOR_DECODE, number):
                for task in tasks:
                    task.result()
            return self._with_pixels(job), extra

        with ThreadPoolExecutor(self.threads, thread_name_prefix="memory-cache") as pool:
            try:
                for number, (job, extra) in enumerate(jobs):
                    stored = job.encoded.stored
                    assert stored is not None
                    missing = np.flatnonzero(self.cache.layout.keeps(job.encoded.ids) & ~stored)
                    parts = [missing[at : at + IMAGES_PER_TASK] for at in range(0, len(missing), IMAGES_PER_TASK)]
                    tasks = [pool.submit(self.trace.call, "decode", number, self._store, job, part) for part in parts]
                    started.append((number, tasks, job, extra))
                    self.use.samples += len(stored)
                    self.use.hits += int(stored.sum())
                    if len(started) > self.ahead:
                        yield next_job()
                while started:
                    yield next_job()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _store(self, job: DecodeJob, rows: Ids) -> None:
        """Decode the samples of some rows as a whole, shrink and store them."""
        encoded, layout = job.encoded, self.cache.layout
        for row in rows.tolist():
            sample = int(encoded.ids[row])
            if self.cache.stored(sample):  # by another process, since the batch was read
                continue
            sides = int(encoded.rows["height"][row]), int(encoded.rows["width"][row])
            image = encoded.images[row]
            pixels = image.reshape(*sides, 3) if encoded.raw[row] else self._decoded(sample, image, sides)
            self.cache.store(sample, resized(pixels, int(layout.heights[sample]), int(layout.widths[sample])))

    def _decoded(self, sample: int, image: Pixels, sides: tuple[int, int]) -> Pixels:
        try:
            pixels: Pixels = simplejpeg.decode_jpeg(image, "RGB", fastdct=self.fast_dct)
        except ValueError as error:
            raise DecodeError.of([sample], first_line(error) or "the JPEG is damaged") from error
        if pixels.shape[:2] != sides:
            found = f"height and width are {pixels.shape[:2]} in the JPEG, and {sides} in the index"
            raise DecodeError.of([sample], found)
        return pixels

    def _with_pixels(self, job: DecodeJob) -> DecodeJob:
        encoded, layout = job.encoded, self.cache.layout
        kept = np.flatnonzero(layout.keeps(encoded.ids))
        if not len(kept):
            return job
        ids, images, raw, rows = encoded.ids[kept], list(encoded.images), encoded.raw.copy(), encoded.rows.copy()
        for row, sample in zip(kept.tolist(), ids.tolist(), strict=True):
            images[row] = self.cache.pixels(sample)
        raw[kept] = True
        sides = np.stack([rows["height"][kept], rows["width"][kept]], axis=1).astype(np.int64)
        stored = np.stack([layout.heights[ids], layout.widths[ids]], axis=1)
        rows["height"][kept], rows["width"][kept] = stored.T
        window = job.window.copy()
        window[kept] = scaled_windows(window[kept], sides, stored)
        with_pixels = dataclasses.replace(encoded, images=images, raw=raw, rows=rows)
        return dataclasses.replace(job, encoded=with_pixels, window=window)

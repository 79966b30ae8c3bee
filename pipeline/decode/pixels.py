"""Decoders of samples that are stored as pixels: nothing is decoded, the crop window is cut out and resized.

On a CPU, the windows are resized like the windows that DALI decodes on a CPU, so equal source pixels give equal images.
On a GPU, `pipeline.decode.dali_pixels` uploads only the windows and resizes them with the DALI decoder's own operators.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pipeline.decode.job import DecodeJob, Decoder, Normalization
from pipeline.decode.resize import Pixels, Resizer
from pipeline.stage_trace import WAIT_FOR_DECODE, StageTrace
from pipeline.storage.buffer_pool import BufferPool
from pipeline.storage.reader import Encoded

T = TypeVar("T")


def windows_of(job: DecodeJob) -> list[Pixels]:
    """Return views of the crop windows of a job whose samples are all pixels, uint8 [height, width, 3] each."""
    rows = job.encoded.rows
    shapes = zip(job.encoded.images, rows["height"].tolist(), rows["width"].tolist(), job.window.tolist(), strict=True)
    return [
        image.reshape(height, width, 3)[y : y + high, x : x + wide]
        for image, height, width, (y, x, high, wide) in shapes
    ]


@dataclass
class PixelsDecoder:
    """A decoder on the CPU for jobs whose samples are all pixels (see `pipeline.decode.job.Decoder`).

    Args:
        threads: threads that resize.
        ahead: number of batches that are resized concurrently.
        normalization: normalization to apply, which makes the output float32. None: uint8.
        trace: records the waits for the threads.
    """

    threads: int
    ahead: int = 2
    normalization: Normalization | None = None
    trace: StageTrace = field(default_factory=StageTrace)

    def decode(self, jobs: Iterable[tuple[DecodeJob, T]]) -> Generator[tuple[torch.Tensor, DecodeJob, T], None, None]:
        """Resize the windows of jobs in order."""
        started: deque[tuple[int, Callable[[], torch.Tensor], DecodeJob, T]] = deque()

        def next_resized() -> tuple[torch.Tensor, DecodeJob, T]:
            number, wait, job, extra = started.popleft()
            return self.trace.call(WAIT_FOR_DECODE, number, wait), job, extra

        # One thread more, because one of them usually waits for the interpreter lock.
        with Resizer(threads=self.threads + 1, normalization=self.normalization) as resizer:
            for number, (job, extra) in enumerate(jobs):
                started.append((number, resizer.start(windows_of(job), job), job, extra))
                if len(started) > self.ahead:
                    yield next_resized()
            while started:
                yield next_resized()


@dataclass
class SplitBatchDecoder:
    """Decodes the rows of each batch that are pixels with one decoder, and the rows that are JPEGs with another.

    Args:
        pixels: decoder of pixels.
        encoded: decoder of JPEGs.
        device: device of both decoders.
    """

    pixels: Decoder
    encoded: Decoder
    device: torch.device

    def decode(self, jobs: Iterable[tuple[DecodeJob, T]]) -> Generator[tuple[torch.Tensor, DecodeJob, T], None, None]:
        """Decode jobs in order.

        Raises:
            DecodeError: a JPEG could not be decoded.
        """
        of_pixels, of_jpegs = itertools.tee(jobs)
        buffers = BufferPool()
        # A decoder starts several batches before it yields the first, so it must get a batch for every job: without
        # rows of its kind, a placeholder.
        with (
            closing(self.pixels.decode(_parts(of_pixels, _pixel_rows, _placeholder_pixels()))) as resized,
            closing(self.encoded.decode(_parts(of_jpegs, _jpeg_rows, _placeholder_jpeg()))) as decoded,
        ):
            for (pixels, _, _), (images, _, (job, extra)) in zip(resized, decoded, strict=True):
                raw = job.encoded.raw
                if raw.all():
                    yield pixels, job, extra
                elif not raw.any():
                    yield images, job, extra
                else:
                    yield self._merged(raw, pixels, images, buffers), job, extra

    def _merged(
        self, raw: NDArray[np.bool_], pixels: torch.Tensor, images: torch.Tensor, buffers: BufferPool
    ) -> torch.Tensor:
        shape = (len(raw), *images.shape[1:])
        if self.device.type == "cpu":
            out = buffers.empty(shape, images.dtype)
            out.numpy()[raw], out.numpy()[~raw] = pixels.numpy(), images.numpy()
            return out
        source = np.empty(len(raw), np.int64)
        source[np.concatenate([np.flatnonzero(raw), np.flatnonzero(~raw)])] = np.arange(len(raw))
        rows = torch.from_numpy(source).pin_memory().to(self.device, non_blocking=True)
        return torch.cat([pixels, images])[rows]


def take_rows(job: DecodeJob, rows: NDArray[np.int64]) -> DecodeJob:
    """Return the job of some rows of a batch."""
    encoded = job.encoded
    some = Encoded(
        ids=encoded.ids[rows],
        images=[encoded.images[row] for row in rows.tolist()],
        rows=encoded.rows[rows],
        raw=encoded.raw[rows],
    )
    return dataclasses.replace(
        job,
        encoded=some,
        window=job.window[rows],
        flip=None if job.flip is None else job.flip[rows],
        region=None if job.region is None else job.region[rows],
    )


def _pixel_rows(job: DecodeJob) -> NDArray[np.int64]:
    return np.flatnonzero(job.encoded.raw)


def _jpeg_rows(job: DecodeJob) -> NDArray[np.int64]:
    return np.flatnonzero(~job.encoded.raw)


def _parts(
    jobs: Iterator[tuple[DecodeJob, T]], rows_of: Callable[[DecodeJob], NDArray[np.int64]], placeholder: Pixels
) -> Iterator[tuple[DecodeJob, tuple[DecodeJob, T]]]:
    """Yield the part of each job that one decoder decodes, and the whole job."""
    for job, extra in jobs:
        rows = rows_of(job)
        part = take_rows(job, rows)
        yield part if len(rows) else _with_placeholder(job, placeholder), (job, extra)


def _with_placeholder(job: DecodeJob, image: Pixels) -> DecodeJob:
    """Return a job of one image of 1 x 1 pixels."""
    rows = job.encoded.rows[:1].copy()
    rows["height"] = rows["width"] = 1
    encoded = Encoded(ids=job.encoded.ids[:1], images=[image], rows=rows, raw=np.array([image.size == 3]))
    return DecodeJob(
        encoded=encoded,
        window=np.array([[0, 0, 1, 1]], np.int32),
        size=job.size,
        flip=None if job.flip is None else np.zeros(1, np.bool_),
        region=None if job.region is None else np.array([[0.0, 0.0, 1.0, 1.0]]),
    )


def _placeholder_pixels() -> Pixels:
    return np.zeros(3, np.uint8)


def _placeholder_jpeg() -> Pixels:
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "JPEG")
    return np.frombuffer(file.getvalue(), np.uint8)

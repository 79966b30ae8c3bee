"""The FFCV decoder: decode, crop, resize and flip on the CPU, for .beton files and for JPEGs from tar shards.

Only FFCV's native library is used, on bytes from this project's own reader. The library is what makes FFCV fast: one
call each to libjpeg-turbo and OpenCV, without Python in between. FFCV's Loader is not used: it hangs if one of its
threads fails, allocates scratch memory for the largest image times several batches, reads through memory maps, and
cannot follow a plan.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.augment.recipe import scale_and_offset
from pipeline.decode.job import IDENTITY, DecodeError, DecodeJob, Normalization
from pipeline.stage_trace import WAIT_FOR_DECODE, StageTrace
from pipeline.storage.buffer_pool import BufferPool
from shards.errors import UserError

try:
    from ffcv.libffcv import ctypes_imdecode, ctypes_resize
    from numba import njit
except (ImportError, OSError) as error:  # OSError: a shared library that FFCV was built with is missing
    raise UserError(
        f"--loader ffcv needs FFCV, which cannot be imported ({error}); install it with: apt-get install -y "
        "libopencv-dev libturbojpeg0-dev pkg-config && pip install 'fat-pipeline[ffcv]'; or use --loader dali"
    ) from error

T = TypeVar("T")

IMAGES_PER_TASK = 8


@dataclass
class FfcvDecoder:
    """A decoder that uses FFCV's library (see `pipeline.decode.job.Decoder`).

    FFCV resizes by area (OpenCV's INTER_AREA) and uses the fast inverse DCT. On average its pixels differ by about 1.5
    levels from PIL's bicubic resize.

    Args:
        device: device of the output; decoding always uses the CPU.
        threads: threads that decode.
        ahead: number of batches that are decoded concurrently.
        normalization: normalization to apply, which makes the output float32. None: uint8.
        trace: records the decoding in every thread, the waits for it and the number of decoded batches.
    """

    device: torch.device
    threads: int
    ahead: int = 2
    normalization: Normalization | None = None
    trace: StageTrace = field(default_factory=StageTrace)

    def decode(self, jobs: Iterable[tuple[DecodeJob, T]]) -> Generator[tuple[torch.Tensor, DecodeJob, T], None, None]:
        """Decode jobs in order.

        Raises:
            DecodeError: a batch could not be decoded.
        """
        in_flight: deque[tuple[_Task, DecodeJob, T]] = deque()
        buffers = BufferPool()

        def decoded() -> int:
            return sum(task.done for task, *_ in list(in_flight))

        def next_decoded() -> tuple[torch.Tensor, DecodeJob, T]:
            task, job, extra = in_flight.popleft()
            images = task.images()
            if self.trace.recording:
                self.trace.level("decoded", decoded())
            return images, job, extra

        with ThreadPoolExecutor(self.threads, thread_name_prefix="ffcv") as pool:
            try:
                for number, (job, extra) in enumerate(jobs):
                    task = _Task(job, self, buffers, pool, number)
                    in_flight.append((task, job, extra))
                    self.trace.level_when_done("decoded", task.parts, decoded)
                    if len(in_flight) > self.ahead:
                        yield next_decoded()
                while in_flight:
                    yield next_decoded()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


class _Task:
    """One batch that is being decoded."""

    def __init__(
        self, job: DecodeJob, decoder: FfcvDecoder, buffers: BufferPool, pool: ThreadPoolExecutor, number: int
    ) -> None:
        self._job, self._device, self._trace, self._number = job, decoder.device, decoder.trace, number
        n, size = len(job.encoded.ids), job.size
        dtype = torch.uint8 if decoder.normalization is None else torch.float32
        if self._device.type == "cuda":
            self._out = torch.empty((n, size, size, 3), dtype=dtype, pin_memory=True)
        else:
            self._out = buffers.empty((n, size, size, 3), dtype)
        normal = decoder.normalization or IDENTITY
        self._scale, self._offset = scale_and_offset(normal.mean, normal.std, size)
        self._geometry = _geometry(job)
        self._failed = np.zeros(n, np.bool_)
        starts = range(0, n, IMAGES_PER_TASK)
        self.parts: list[Future[None]] = [
            pool.submit(self._trace.call, "decode", number, self._run, slice(at, at + IMAGES_PER_TASK)) for at in starts
        ]

    def images(self) -> torch.Tensor:
        """Wait for the batch and return it on its device: [n, size, size, 3].

        Raises:
            DecodeError: some images could not be decoded; the message names them.
        """
        with self._trace.span(WAIT_FOR_DECODE, self._number):
            for part in self.parts:
                part.result()
        if self._failed.any():
            raise DecodeError.of(self._job.encoded.ids[self._failed], "FFCV's JPEG decoder found the data damaged")
        with self._trace.span("transfer", self._number):
            return self._out.to(self._device, non_blocking=True)

    @property
    def done(self) -> bool:
        """Whether `images` need not wait."""
        return all(part.done() for part in reversed(self.parts))

    def _run(self, rows: slice) -> None:
        encoded, geometry = self._job.encoded, self._geometry[rows]
        stored = np.array([(image.ctypes.data, image.size) for image in encoded.images[rows]], np.int64)
        out = self._out.numpy()[rows]
        # Scratch memory for the largest decoded image of this task and for the largest resized image.
        source = int((geometry[:, 0] * geometry[:, 1]).max())
        resized = int((geometry[:, 6] * geometry[:, 7]).max())
        scratch = np.empty((source + resized, 3), np.uint8)
        _decode(
            stored, encoded.raw[rows], geometry, scratch, source, self._scale, self._offset, out, self._failed[rows]
        )


def _geometry(job: DecodeJob) -> NDArray[np.int64]:
    """Compute the arguments of `_decode` for each image.

    Returns:
        int64 [n, 11]: source height, width; window y, x, height, width; resized height, width; corner y, x; flip.
    """
    n = len(job.encoded.ids)
    rows = job.encoded.rows
    sides = np.stack([rows["height"], rows["width"]], axis=1)
    # OpenCV resizes to whole pixels only. For images of extreme aspect ratio, the size may be off by half a pixel.
    resize, anchor = map(np.rint, job.resized_windows())
    flip = np.zeros(n) if job.flip is None else job.flip
    corner = np.minimum(anchor, resize - job.size)
    return np.concatenate([sides, job.window, resize, corner, flip[:, None]], axis=1).astype(np.int64)


@njit(nogil=True)
def _decode(stored, raw, geometry, scratch, resized_at, scale, offset, out, failed):  # type: ignore[no-untyped-def] # noqa: PLR0917
    """Decode n images one after the other, without the interpreter lock.

    Args:
        stored: int64 [n, 2]: address and size of the stored bytes.
        raw: bool [n]: whether the bytes are pixels instead of a JPEG.
        geometry: int64 [n, 11], see `_geometry`.
        scratch: uint8 [pixels, 3]: memory for the decoded image and, from row `resized_at` on, for the resized image.
        scale, offset: float32 [size * 3], applied if `out` is floating-point.
        out: uint8 or float32 [n, size, size, 3].
        failed: bool [n], set to True where the JPEG is damaged.
    """
    size = out.shape[1]
    for i in range(len(stored)):
        height, width, y, x, high, wide, to_high, to_wide, top, left, flip = geometry[i]
        pixels = scratch.ctypes.data
        if raw[i]:
            pixels = stored[i, 0]
        elif ctypes_imdecode(
            stored[i, 0], stored[i, 1], height, width, pixels, height, width, 0, 0, 1, 1, False, False
        ):
            failed[i] = True
            continue
        resized = scratch[resized_at : resized_at + to_high * to_wide].reshape(to_high, to_wide, 3)
        ctypes_resize(0, pixels, height, width, y, y + high, x, x + wide, resized.ctypes.data, to_high, to_wide)
        cropped = resized[top : top + size, left : left + size]
        _finish(cropped, flip, scale, offset, out[i].reshape(size, size * 3))


@njit(nogil=True)
def _finish(pixels, flip, scale, offset, out):  # type: ignore[no-untyped-def]
    """Flip and normalize uint8 [size, size, 3] into `out` [size, size * 3], row by row. A uint8 `out` is not scaled."""
    size = len(pixels)
    row = np.empty((size, 3), np.uint8)
    values = row.reshape(size * 3)
    for y in range(size):
        if flip:
            row[:] = pixels[y, ::-1]
        else:
            row[:] = pixels[y]
        if out.itemsize == 1:
            out[y] = values
        else:
            for i in range(size * 3):
                out[y, i] = values[i] * scale[i] + offset[i]

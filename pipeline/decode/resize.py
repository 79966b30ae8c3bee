"""Resize, crop, flip and normalize decoded images of different sizes on CPU threads.

PyTorch's antialiased bicubic resize of uint8 images (AVX2) uses the arithmetic of Pillow: the two differ by rounding
only (at most 2 levels). It takes a tenth of the time of DALI's resize, which uses floating point. It cannot resize
regions that start or end inside a pixel; such regions (of images with an extreme aspect ratio) are resized by Pillow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional

from pipeline.augment.recipe import scale_and_offset
from pipeline.decode.finish import finish
from pipeline.decode.job import IDENTITY, DecodeJob, Normalization
from pipeline.storage.buffer_pool import BufferPool

IMAGES_PER_TASK = 8

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float64]


class Resizer:
    """Resizes the decoded windows of a batch to the output size, on a pool of threads.

    Args:
        threads: number of threads.
        normalization: normalization to apply, which makes the output float32. None: uint8.
    """

    def __init__(self, *, threads: int, normalization: Normalization | None) -> None:
        self._normalization = normalization
        self._buffers = BufferPool()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="resize")

    def __call__(self, windows: Sequence[Pixels], job: DecodeJob) -> torch.Tensor:
        """Return the batch: uint8 [n, job.size, job.size, 3], or float32 if normalized; the caller owns its memory.

        Args:
            windows: the decoded crop window of each image, uint8 [height, width, 3]; may be overwritten after the call.
            job: the job that the windows were decoded for.
        """
        return self.start(windows, job)()

    def start(self, windows: Sequence[Pixels], job: DecodeJob) -> Callable[[], torch.Tensor]:
        """Start to resize a batch. Return a function that waits for the result of a call with these arguments.

        The windows must not be overwritten before that function has returned.
        """
        n, size = len(windows), job.size
        heights_widths, corners = map(np.rint, job.resized_windows())
        whole = _whole(job)
        targets, flips = np.hstack([heights_widths, corners]).astype(int).tolist(), _flips(job)
        dtype = torch.uint8 if self._normalization is None else torch.float32
        normal = self._normalization or IDENTITY
        scale, offset = scale_and_offset(normal.mean, normal.std, size)
        out = self._buffers.empty((n, size, size, 3), dtype)
        rows = out.numpy().reshape(n, size, size * 3)

        def resize_images(start: int) -> None:
            for i in range(start, min(start + IMAGES_PER_TASK, n)):
                if whole[i]:
                    pixels = _resize_and_crop(windows[i], targets[i], size)
                else:
                    assert job.region is not None
                    pixels = _resize_region(windows[i], job.region[i], size)
                finish(np.ascontiguousarray(pixels), flips[i], scale, offset, rows[i])

        tasks = [self._pool.submit(resize_images, start) for start in range(0, n, IMAGES_PER_TASK)]

        def wait() -> torch.Tensor:
            for task in tasks:
                task.result()
            return out

        return wait

    def __enter__(self) -> Resizer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def _resize_and_crop(window: Pixels, target: list[int], size: int) -> Pixels:
    """Resize the whole window with PyTorch to (height, width), then crop the output at (top, left)."""
    height, width, top, left = target
    return resized(window, height, width)[top : top + size, left : left + size]


def resized(pixels: Pixels, height: int, width: int) -> Pixels:
    """Resize uint8 [H, W, 3] with PyTorch's antialiased bicubic filter. Pixels of this size are returned unchanged."""
    if pixels.shape[:2] == (height, width):
        return pixels
    # PyTorch would copy pixels that are not contiguous, on several threads if there are more than its grain size.
    image = torch.from_numpy(np.ascontiguousarray(pixels).reshape(1, *pixels.shape).transpose(0, 3, 1, 2))
    image = functional.interpolate(image, size=(height, width), mode="bicubic", antialias=True)
    result: Pixels = image.numpy()[0].transpose(1, 2, 0)
    return result


def _resize_region(window: Pixels, region: Floats, size: int) -> Pixels:
    """Resize a region with fractional borders with Pillow."""
    y, x, height, width = region.tolist()
    # Rounding errors may move the region's border outside the window.
    box = (x, y, min(x + width, window.shape[1]), min(y + height, window.shape[0]))
    image = Image.fromarray(window).resize((size, size), Image.Resampling.BICUBIC, box)
    return np.array(image)  # not read-only: compiled functions have one type of array


def _whole(job: DecodeJob) -> list[bool]:
    """Return for each image whether the size and corner of its resized window are whole numbers, up to rounding."""
    values = np.hstack(job.resized_windows())
    whole: list[bool] = (np.abs(values - np.rint(values)).max(axis=1) < 1e-6).tolist()
    return whole


def _flips(job: DecodeJob) -> list[bool]:
    return [False] * len(job.window) if job.flip is None else job.flip.tolist()

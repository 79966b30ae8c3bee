"""Resize, crop, flip and normalise decoded images of different sizes on CPU threads.

PyTorch's antialiased bicubic resize of uint8 images (AVX2) uses the arithmetic of Pillow: the two differ by rounding
only (at most 2 levels). It takes a tenth of the time of DALI's resize, which uses floating point. It cannot resize
regions that start or end inside a pixel; such regions (of images with an extreme aspect ratio) are resized by Pillow.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional

from pipeline.augment.recipe import scale_and_offset
from pipeline.decode.job import DecodeJob, Normalisation
from pipeline.storage.buffer_pool import BufferPool

IMAGES_PER_TASK = 8

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float64]


class Resizer:
    """Resizes the decoded windows of a batch to the output size, on a pool of threads.

    Args:
        size: side of the output in pixels.
        threads: number of threads.
        normalisation: normalisation to apply, which makes the output float32. None: uint8.
    """

    def __init__(self, *, size: int, threads: int, normalisation: Normalisation | None) -> None:
        self._size = size
        self._row = None if normalisation is None else scale_and_offset(normalisation.mean, normalisation.std, size)
        self._buffers = BufferPool()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="resize")

    def __call__(self, windows: Sequence[Pixels], job: DecodeJob) -> torch.Tensor:
        """Return the batch: uint8 [n, size, size, 3], or float32 if normalised; the caller owns its memory.

        Args:
            windows: the decoded crop window of each image, uint8 [height, width, 3]; may be overwritten after the call.
            job: the job that the windows were decoded for.
        """
        n, size = len(windows), self._size
        heights_widths, corners = job.resized_windows(size)
        dtype = torch.uint8 if self._row is None else torch.float32
        out = self._buffers.empty((n, size, size, 3), dtype)
        rows = out.numpy()

        def resize_images(start: int) -> None:
            for i in range(start, min(start + IMAGES_PER_TASK, n)):
                if _whole(heights_widths[i]) and _whole(corners[i]):
                    pixels = self._resize_and_crop(windows[i], np.rint(heights_widths[i]), np.rint(corners[i]))
                else:
                    assert job.region is not None
                    pixels = self._resize_region(windows[i], job.region[i])
                self._finish(pixels, job.flip is not None and job.flip[i], rows[i])

        for _ in self._pool.map(resize_images, range(0, n, IMAGES_PER_TASK)):
            pass
        return out

    def __enter__(self) -> Resizer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _resize_and_crop(self, window: Pixels, resize: Floats, corner: Floats) -> Pixels:
        """Resize the whole window with PyTorch, then crop the output."""
        (height, width), (top, left) = resize.astype(int).tolist(), corner.astype(int).tolist()
        image = torch.from_numpy(window)[None].permute(0, 3, 1, 2)
        if window.shape[:2] != (height, width):
            image = functional.interpolate(image, size=(height, width), mode="bicubic", antialias=True)
        pixels: Pixels = image[0].permute(1, 2, 0).numpy()
        return pixels[top : top + self._size, left : left + self._size]

    def _resize_region(self, window: Pixels, region: Floats) -> Pixels:
        """Resize a region with fractional borders with Pillow."""
        y, x, height, width = region.tolist()
        # Rounding errors may move the region's border outside the window.
        box = (x, y, min(x + width, window.shape[1]), min(y + height, window.shape[0]))
        image = Image.fromarray(window).resize((self._size, self._size), Image.Resampling.BICUBIC, box)
        return np.asarray(image)

    def _finish(self, pixels: Pixels, flip: bool | np.bool_, out: NDArray[np.uint8] | NDArray[np.float32]) -> None:
        # NumPy instead of PyTorch, which would start its thread pool for every copy of this size.
        if flip:
            flipped = np.empty_like(pixels, order="C")
            np.copyto(flipped.view("V3"), np.ascontiguousarray(pixels).view("V3")[:, ::-1])
            pixels = flipped
        if self._row is None:
            np.copyto(out, pixels)
            return
        values = out.reshape(self._size, -1)
        scale, offset = self._row
        np.multiply(pixels.reshape(self._size, -1), scale, out=values)
        np.add(values, offset, out=values)


def _whole(values: Floats) -> bool:
    """Return whether the values are whole numbers, up to rounding errors."""
    return bool(np.abs(values - np.rint(values)).max() < 1e-6)

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
        threads: number of threads.
        normalisation: normalisation to apply, which makes the output float32. None: uint8.
    """

    def __init__(self, *, threads: int, normalisation: Normalisation | None) -> None:
        self._normalisation = normalisation
        self._buffers = BufferPool()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="resize")

    def __call__(self, windows: Sequence[Pixels], job: DecodeJob) -> torch.Tensor:
        """Return the batch: uint8 [n, job.size, job.size, 3], or float32 if normalised; the caller owns its memory.

        Args:
            windows: the decoded crop window of each image, uint8 [height, width, 3]; may be overwritten after the call.
            job: the job that the windows were decoded for.
        """
        n, size, normal = len(windows), job.size, self._normalisation
        heights_widths, corners = job.resized_windows()
        dtype = torch.uint8 if normal is None else torch.float32
        scaling = None if normal is None else scale_and_offset(normal.mean, normal.std, size)
        out = self._buffers.empty((n, size, size, 3), dtype)
        rows = out.numpy()

        def resize_images(start: int) -> None:
            for i in range(start, min(start + IMAGES_PER_TASK, n)):
                if _whole(heights_widths[i]) and _whole(corners[i]):
                    pixels = _resize_and_crop(windows[i], np.rint(heights_widths[i]), np.rint(corners[i]), size)
                else:
                    assert job.region is not None
                    pixels = _resize_region(windows[i], job.region[i], size)
                _finish(pixels, job.flip is not None and job.flip[i], scaling, rows[i])

        for _ in self._pool.map(resize_images, range(0, n, IMAGES_PER_TASK)):
            pass
        return out

    def __enter__(self) -> Resizer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def _resize_and_crop(window: Pixels, resize: Floats, corner: Floats, size: int) -> Pixels:
    """Resize the whole window with PyTorch, then crop the output."""
    (height, width), (top, left) = resize.astype(int).tolist(), corner.astype(int).tolist()
    image = torch.from_numpy(window)[None].permute(0, 3, 1, 2)
    if window.shape[:2] != (height, width):
        image = functional.interpolate(image, size=(height, width), mode="bicubic", antialias=True)
    pixels: Pixels = image[0].permute(1, 2, 0).numpy()
    return pixels[top : top + size, left : left + size]


def _resize_region(window: Pixels, region: Floats, size: int) -> Pixels:
    """Resize a region with fractional borders with Pillow."""
    y, x, height, width = region.tolist()
    # Rounding errors may move the region's border outside the window.
    box = (x, y, min(x + width, window.shape[1]), min(y + height, window.shape[0]))
    image = Image.fromarray(window).resize((size, size), Image.Resampling.BICUBIC, box)
    return np.asarray(image)


def _finish(
    pixels: Pixels,
    flip: bool | np.bool_,
    scaling: tuple[NDArray[np.float32], NDArray[np.float32]] | None,
    out: NDArray[np.uint8] | NDArray[np.float32],
) -> None:
    """Flip and normalise one image into `out`. `scaling`: scale and offset of one row; None: copy uint8 values."""
    # NumPy instead of PyTorch, which would start its thread pool for every copy of this size.
    if flip:
        flipped = np.empty_like(pixels, order="C")
        np.copyto(flipped.view("V3"), np.ascontiguousarray(pixels).view("V3")[:, ::-1])
        pixels = flipped
    if scaling is None:
        np.copyto(out, pixels)
        return
    values = out.reshape(len(pixels), -1)
    scale, offset = scaling
    np.multiply(pixels.reshape(len(pixels), -1), scale, out=values)
    np.add(values, offset, out=values)


def _whole(values: Floats) -> bool:
    """Return whether the values are whole numbers, up to rounding errors."""
    return bool(np.abs(values - np.rint(values)).max() < 1e-6)

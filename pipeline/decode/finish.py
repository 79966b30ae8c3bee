"""Flip and normalize resized images on the CPU: compiled by Numba if it is installed, else with NumPy and PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

try:
    from pipeline.augment.numba_impl.compiler import cached
except ImportError:  # Numba is not installed
    cached = None  # type: ignore[assignment]

# Operations of PyTorch on this many values or more run on several threads (at::internal::GRAIN_SIZE). An OpenMP team
# for every thread of a pool would cost more than the operation.
TORCH_GRAIN_SIZE = 32768


def finish_with_numpy(
    pixels: NDArray[np.uint8],
    flip: bool,
    scale: NDArray[np.float32],
    offset: NDArray[np.float32],
    out: NDArray[Any],
) -> None:
    """Flip and normalize one image, row by row. All implementations give the same values.

    Args:
        pixels: uint8 [size, size, 3], contiguous.
        flip: whether to flip horizontally.
        scale, offset: float32 [size * 3], applied if `out` is floating-point.
        out: uint8 or float32 [size, size * 3].
    """
    size = len(pixels)
    rows = max(1, (TORCH_GRAIN_SIZE - 1) // (3 * size))
    for top in range(0, size, rows):
        block, values = pixels[top : top + rows], out[top : top + rows]
        if flip:  # PyTorch needs a fifth of NumPy's time
            block = torch.from_numpy(block).permute(2, 0, 1)[None].flip(3)[0].permute(1, 2, 0).numpy()
        np.copyto(values, block.reshape(len(block), -1))
        if values.dtype != np.uint8:
            values *= scale
            values += offset


def _finish_compiled(pixels, flip, scale, offset, out):  # type: ignore[no-untyped-def]
    size, one, two, three = len(pixels), np.uint64(1), np.uint64(2), np.uint64(3)
    flipped = np.empty(size * 3, np.uint8)
    last = np.uint64(size * 3 - 3)
    for y in range(size):
        stored = pixels[y].reshape(size * 3)
        if flip:
            # Unsigned, because Numba checks whether a signed index is negative, which takes four times as long.
            for x in range(np.uint64(0), np.uint64(size * 3), three):
                flipped[x] = stored[last - x]
                flipped[x + one] = stored[last - x + one]
                flipped[x + two] = stored[last - x + two]
            stored = flipped
        if out.itemsize == 1:
            for i in range(size * 3):
                out[y, i] = stored[i]
        else:
            for i in range(size * 3):
                out[y, i] = np.float32(stored[i]) * scale[i] + offset[i]


finish: Callable[..., None] = finish_with_numpy
if cached is not None:
    finish = cached(_finish_compiled)

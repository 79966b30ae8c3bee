"""Upload small arrays to the device: one pinned buffer and one asynchronous copy for all parameters of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGN = 16  # alignment in bytes, a multiple of the size of every dtype


def upload(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """Copy arrays to tensors on the device, with the same shapes and dtypes (uint64 becomes int64 with the same bits).

    The host does not wait: the copy is queued on the current stream, and PyTorch keeps the pinned buffer until the copy
    is done.
    """
    starts = np.cumsum([0, *(-(-array.nbytes // _ALIGN) * _ALIGN for array in arrays)])
    buffer = torch.empty(int(starts[-1]), dtype=torch.uint8, pin_memory=device.type == "cuda")
    view = buffer.numpy()
    for start, array in zip(starts, arrays, strict=False):
        view[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    moved = buffer.to(device, non_blocking=True)
    return [
        moved[start : start + array.nbytes].view(_dtype(array)).view(array.shape)
        for start, array in zip(starts, arrays, strict=False)
    ]


def _dtype(array: NDArray[Any]) -> torch.dtype:
    dtype = np.dtype(np.int64) if array.dtype == np.uint64 else array.dtype
    return torch.from_numpy(np.empty(0, dtype)).dtype

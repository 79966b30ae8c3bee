"""A pool of reusable CPU buffers. Page faults of newly allocated memory cost more than the loader's own work on it (64
float images: 15 ms of page faults, 3 ms of normalizing)."""

from __future__ import annotations

import logging
import threading
import weakref
from queue import SimpleQueue
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from shards.errors import first_line

if TYPE_CHECKING:  # not at run time: `pipeline.jobs` must not import torch
    import torch

log = logging.getLogger(__name__)

_KEPT = 8  # maximum number of free buffers, more than a loader uses at a time
_SIZE_BITS = 3  # buffer sizes are rounded up to 3 significant bits, so that batches of similar size share buffers


class BufferPool:
    """Allocates tensors whose memory returns to the pool when no tensor, view, array or autograd graph refers to it.
    Thread-safe.

    Args:
        pinned: allocate page-locked memory, from which the GPU copies directly.
    """

    def __init__(self, *, pinned: bool = False) -> None:
        self._pinned = pinned
        self._free: list[NDArray[np.uint8]] = []
        self._returned: SimpleQueue[NDArray[np.uint8]] = SimpleQueue()
        self._lock = threading.Lock()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return an uninitialized, contiguous CPU tensor."""
        import torch

        return torch.from_numpy(self.bytes(int(np.prod(shape)) * dtype.itemsize)).view(dtype).view(shape)

    def bytes(self, size: int) -> NDArray[np.uint8]:
        """Return an uninitialized array, uint8 [size]."""
        granularity = 1 << max(0, size.bit_length() - _SIZE_BITS)
        capacity = max(1, -(-size // granularity) * granularity)
        with self._lock:
            self._collect()
            # The most recently returned buffer may still be in the CPU's cache.
            fits = [i for i, memory in enumerate(self._free) if memory.nbytes >= capacity]
            memory = self._free.pop(fits[-1]) if fits else None
        if memory is None:
            memory = self._allocate(capacity)
        # All views and tensors refer to `lease`, so its finalizer runs when the last of them is gone. A slice of
        # `memory` is not sufficient: NumPy sets the base of its views to `memory` itself.
        lease = np.frombuffer(memory.data, np.uint8, count=size)
        weakref.finalize(lease, self._release, memory).atexit = False
        return lease

    def _allocate(self, size: int) -> NDArray[np.uint8]:
        if self._pinned:
            import torch

            try:
                pinned: NDArray[np.uint8] = torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
                return pinned
            except RuntimeError as error:  # pageable memory works too, but is slower
                self._pinned = False
                log.warning(
                    "cannot page-lock memory for encoded images (%s); using pageable memory, decoding will be slower",
                    first_line(error),
                )
        return np.empty(size, np.uint8)

    def _release(self, memory: NDArray[np.uint8]) -> None:
        # The garbage collector may call this in the thread that holds the lock: waiting for it would deadlock.
        self._returned.put(memory)
        if self._lock.acquire(blocking=False):
            try:
                self._collect()
            finally:
                self._lock.release()

    def _collect(self) -> None:
        """Move returned buffers to the free list and drop the oldest beyond `_KEPT`. The caller holds the lock."""
        while not self._returned.empty():
            self._free.append(self._returned.get_nowait())
        del self._free[:-_KEPT]

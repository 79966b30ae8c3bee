"""Large CPU buffers that are used again: fresh memory is handed out by the operating system page by page, which costs
more than what loaders do with it (a batch of 64 float images: 15 ms of page faults, 3 ms of normalising)."""

from __future__ import annotations

import logging
import threading
import weakref
from queue import SimpleQueue
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from shards.errors import first_line

if TYPE_CHECKING:  # `pipeline.jobs` runs without torch
    import torch

log = logging.getLogger(__name__)

_KEPT = 8  # free buffers; more than a loader has on its hands at once
_SIZES_PER_OCTAVE_BITS = 3  # sizes are rounded up to 4 in each octave, so that batches of about the same size share


class BufferPool:
    """Tensors whose memory comes back when nobody refers to it any more: no tensor, view, array or autograd graph.
    Thread-safe.

    Args:
        pinned: page-locked memory, which a GPU reads without a further copy on the host.
    """

    def __init__(self, *, pinned: bool = False) -> None:
        self._pinned = pinned
        self._free: list[NDArray[np.uint8]] = []
        self._returned: SimpleQueue[NDArray[np.uint8]] = SimpleQueue()
        self._lock = threading.Lock()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised, contiguous CPU tensor."""
        import torch

        return torch.from_numpy(self.bytes(int(np.prod(shape)) * dtype.itemsize)).view(dtype).view(shape)

    def bytes(self, size: int) -> NDArray[np.uint8]:
        """An uninitialised array, uint8 [size]."""
        grain = 1 << max(0, size.bit_length() - _SIZES_PER_OCTAVE_BITS)
        room = max(1, -(-size // grain) * grain)
        with self._lock:
            self._collect()
            # The one that came back last may still be in the CPU's cache.
            fits = [i for i, memory in enumerate(self._free) if memory.nbytes >= room]
            memory = self._free.pop(fits[-1]) if fits else None
        if memory is None:
            memory = self._fresh(room)
        # Views of it, tensors too, refer to this very array, whose end says that nobody refers to the memory any more:
        # NumPy would let views of a slice of `memory` refer to `memory` instead.
        lease = np.frombuffer(memory.data, np.uint8, count=size)
        weakref.finalize(lease, self._take_back, memory).atexit = False
        return lease

    def _fresh(self, size: int) -> NDArray[np.uint8]:
        if self._pinned:
            import torch

            try:
                pinned: NDArray[np.uint8] = torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
                return pinned
            except RuntimeError as error:  # it is not worth ending a run
                self._pinned = False
                log.warning("no page-locked memory for encoded images (%s); decoding takes longer", first_line(error))
        return np.empty(size, np.uint8)

    def _take_back(self, memory: NDArray[np.uint8]) -> None:
        # The garbage collector may call this in a thread that holds the lock, so it must not wait for it.
        self._returned.put(memory)
        if self._lock.acquire(blocking=False):
            try:
                self._collect()
            finally:
                self._lock.release()

    def _collect(self) -> None:
        """Move returned buffers to the free ones, and drop the oldest beyond `_KEPT`. Call with the lock held."""
        while not self._returned.empty():
            self._free.append(self._returned.get_nowait())
        del self._free[:-_KEPT]

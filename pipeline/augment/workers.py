"""Threads and reusable memory for augmentation on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from threading import local
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.storage.buffer_pool import BufferPool


class Workers:
    """Threads that share the samples of a batch, and the memory for the results. Use it as a context manager.

    Args:
        threads: number of threads, which start when they are first needed. 1: use the calling thread.
    """

    def __init__(self, threads: int) -> None:
        self.buffers = BufferPool()
        """Memory for results."""
        self._local = local()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="augment") if threads > 1 else None

    def map(self, work: Callable[[int], Any], items: Iterable[int]) -> None:
        """Call `work` for each item and wait. The first exception is raised."""
        for _ in self._pool.map(work, items) if self._pool else map(work, items):
            pass

    def scratch(self, size: int) -> NDArray[np.uint8]:
        """Return memory for intermediate values, uint8 [size], which belongs to the calling thread."""
        memory: NDArray[np.uint8] | None = getattr(self._local, "memory", None)
        if memory is None or len(memory) < size:
            memory = self._local.memory = np.empty(size, np.uint8)
        return memory[:size]

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)

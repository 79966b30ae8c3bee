"""The DALI decoder for samples that are stored as pixels: upload only the crop windows, resize and flip on a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.decode.dali import DaliDecoder
from pipeline.decode.dali_graph import DaliGraph
from pipeline.decode.job import DecodeJob
from pipeline.decode.pixels import windows_of
from pipeline.decode.resize import Pixels
from pipeline.storage.buffer_pool import BufferPool

T = TypeVar("T")


@dataclass
class DaliPixelsDecoder(DaliDecoder):
    """A decoder on a GPU for jobs whose samples are all pixels (see `pipeline.decode.job.Decoder`).

    The operators after decoding are those of `DaliDecoder`, so equal source pixels give equal images.
    """

    _buffers: BufferPool = field(default_factory=lambda: BufferPool(pinned=torch.cuda.is_available()), init=False)
    _pool: ThreadPoolExecutor | None = field(default=None, init=False)

    def decode(self, jobs: Iterable[tuple[DecodeJob, T]]) -> Generator[tuple[torch.Tensor, DecodeJob, T], None, None]:
        """Resize the windows of jobs in order."""
        with ThreadPoolExecutor(self.threads, thread_name_prefix="windows") as self._pool:
            yield from super().decode(jobs)

    @property
    def _graph(self) -> DaliGraph:
        return dataclasses.replace(super()._graph, pixels=True, shares_cpu=False)

    def _inputs(
        self, job: DecodeJob, by_cpu: NDArray[np.bool_] | None = None, hit: NDArray[np.bool_] | None = None
    ) -> tuple[Any, ...]:
        _, *rest = super()._inputs(job)
        return (self._gathered(windows_of(job)), *rest)

    def _gathered(self, windows: list[Pixels]) -> list[Pixels]:
        """Copy the windows into one buffer of page-locked memory, from which the GPU copies them."""
        buffer = self._buffers.bytes(sum(window.size for window in windows))
        ends = np.cumsum([0, *(window.size for window in windows)]).tolist()
        copies = [
            buffer[start:end].reshape(window.shape)
            for (start, end), window in zip(pairwise(ends), windows, strict=True)
        ]
        list((map if self._pool is None else self._pool.map)(np.copyto, copies, windows))
        return copies

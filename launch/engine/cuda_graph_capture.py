"""Capture and replay CUDA graphs."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

WARM_UP = 3  # eager passes before the capture, as in torch.cuda.make_graphed_callables

Results: TypeAlias = list[Tensor | None]
Work: TypeAlias = Callable[[], Results]


class Recorder(Protocol):
    """Captures work on static tensors for replay."""

    def warm_up(self, work: Callable[[], object]) -> None:
        """Run `work` eagerly, so that nothing is compiled, initialized or tuned for the first time during a capture."""

    def record(self, work: Work) -> tuple[Results, Callable[[], None]]:
        """Capture `work`; return its static results, and a function that replays it and overwrites the results."""

    def release(self) -> None:
        """Free memory, after the last reference to results and replay functions has been deleted."""


class CudaRecorder:
    """Captures CUDA graphs that share one memory pool.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, work: Callable[[], object]) -> None:
        gc.collect()  # frees graphs of failed captures now: their finalizers must not run during a capture
        side = torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                work()
        torch.cuda.current_stream(self._device).wait_stream(side)

    def record(self, work: Work) -> tuple[Results, Callable[[], None]]:
        graph, before, failure = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device), None
        results: Results = []
        try:
            # thread_local: NCCL's watchdog and the loader may call CUDA from their threads during the capture.
            with _no_collection(), torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                try:
                    results = work()
                except Exception as error:
                    failure = error  # raised below, because ending an invalid capture raises a less specific error
        except Exception as error:
            failure = failure or error
            torch.cuda.set_stream(before)  # a failed torch.cuda.graph does not restore the stream
            self._abandon(graph)
        if failure is not None:
            raise failure
        return results, graph.replay

    def release(self) -> None:
        gc.collect()  # frees model parts, autograd nodes and tracebacks, which form reference cycles
        torch.cuda.empty_cache()

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """Reset state of PyTorch that `CUDAGraph.capture_end` does not reset after an invalid capture.

        Otherwise the allocator would assume that a capture is still running and postpone the reuse of memory, and the
        default generator would raise "Offset increment outside graph capture".
        """
        index = torch.cuda.current_device() if self._device.index is None else self._device.index
        with suppress(RuntimeError):  # raised if PyTorch has already ended the allocation to the pool
            torch._C._cuda_endAllocateToPool(index, self._pool)
            torch._C._cuda_releasePool(index, self._pool)
            _ABANDONED.append(graph)
        generator = torch.cuda.default_generators[index]
        generator.graphsafe_set_state(generator.clone_state())


@contextmanager
def _no_collection() -> Iterator[None]:
    """Pause Python's garbage collector: finalizers that call CUDA, such as those of graphs, invalidate a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


# Graphs of failed captures are kept alive, because the allocator of pinned memory has pointers to them, through which
# it queries whether they are being captured.
_ABANDONED: list[torch.cuda.CUDAGraph] = []

RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": CudaRecorder}
"""Recorder class of each device type."""

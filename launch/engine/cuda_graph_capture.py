"""Capture work on a device as CUDA graphs."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

WARM_UP = 3  # eager passes before the capture, as many as torch.cuda.make_graphed_callables makes

Results: TypeAlias = list[Tensor | None]
Work: TypeAlias = Callable[[], Results]


class Recorder(Protocol):
    """Captures work on static tensors, to replay it."""

    def warm_up(self, work: Callable[[], object]) -> None:
        """Run `work`, so that nothing is compiled, initialised or chosen for the first time during a capture."""

    def record(self, work: Work) -> tuple[Results, Callable[[], None]]:
        """Capture `work`; returns its results, which stay where they are, and what computes them anew in place."""

    def release(self) -> None:
        """Give memory back after the last reference to results and replays is gone."""


class CudaRecorder:
    """Captures CUDA graphs that share one memory pool.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, work: Callable[[], object]) -> None:
        gc.collect()  # graphs and tracebacks of failed captures hold memory, and may not be finalised in a capture
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
            # thread_local: NCCL's watchdog and the loader may call CUDA from their threads meanwhile.
            with _no_collection(), torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                try:
                    results = work()
                except Exception as error:
                    failure = error  # raised below: the end of the capture would hide it behind an error of its own
        except Exception as error:
            failure = failure or error
            torch.cuda.set_stream(before)  # torch.cuda.graph has left its own stream current
            self._abandon(graph)
        if failure is not None:
            raise failure
        return results, graph.replay

    def release(self) -> None:
        gc.collect()  # parts, autograd nodes and tracebacks refer to one another
        torch.cuda.empty_cache()

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """Do what `CUDAGraph.capture_end` leaves undone when the capture was invalid.

        The allocator would go on to believe in a capture and put off the reuse of memory that other streams have used,
        and the default generator would refuse to draw: "Offset increment outside graph capture".
        """
        index = torch.cuda.current_device() if self._device.index is None else self._device.index
        with suppress(RuntimeError):  # raised where torch has ended the allocation itself
            torch._C._cuda_endAllocateToPool(index, self._pool)
            torch._C._cuda_releasePool(index, self._pool)
            _ABANDONED.append(graph)
        generator = torch.cuda.default_generators[index]
        generator.graphsafe_set_state(generator.clone_state())


@contextmanager
def _no_collection() -> Iterator[None]:
    """Pause Python's garbage collector: finalisers that call CUDA, such as a graph's, would invalidate a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


# The allocator of pinned memory asks these graphs whether a stream is being captured, and is never told to stop.
_ABANDONED: list[torch.cuda.CUDAGraph] = []

RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": CudaRecorder}
"""By type of device."""

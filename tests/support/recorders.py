"""CPU replacements for recording CUDA graphs, which treat memory as CUDA graphs do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from launch.engine.cuda_graph_capture import Results, Work


class ReplayOnCpu:
    """Runs the recorded work again at every replay, and writes the results into the memory of the first run.

    All recordings share a memory pool. Tensors of a recording can be in memory that an earlier recording used for
    intermediate results, so replaying the earlier recording overwrites them; here it overwrites them with NaN.
    """

    def __init__(self, device: torch.device) -> None:
        self.recorded = self.replayed = 0
        self.released = False
        self._in_pool: list[list[Tensor]] = []

    def warm_up(self, work: Callable[[], object]) -> None:
        work()

    def record(self, work: Work) -> tuple[Results, Callable[[], None]]:
        with _Allocations() as allocations:
            static = work()
        number, self.recorded = self.recorded, self.recorded + 1
        self._in_pool.append([tensor for tensor in static if tensor is not None and allocations.made(tensor)])

        def replay() -> None:
            self.replayed += 1
            for later in self._in_pool[number + 1 :]:
                for overwritten in later:
                    overwritten.fill_(torch.nan)
            for target, value in zip(static, work(), strict=True):
                if target is not None:
                    target.copy_(value)

        return static, replay

    def release(self) -> None:
        self.released = True


class _Allocations(TorchDispatchMode):
    """Records which tensors are allocated in the context."""

    def __init__(self) -> None:
        super().__init__()
        # Weak references instead of addresses, which could be reused.
        self._before, self._inside = set[StorageWeakRef](), set[StorageWeakRef]()

    def made(self, tensor: Tensor) -> bool:
        return StorageWeakRef(tensor.untyped_storage()) in self._inside

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._before |= _storages((args, kwargs)) - self._inside
        result = func(*args, **(kwargs or {}))
        self._inside |= _storages(result) - self._before
        return result


def _storages(tree: Any) -> set[StorageWeakRef]:
    return {StorageWeakRef(leaf.untyped_storage()) for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}


class FailsAt(ReplayOnCpu):
    """Fails at the capture with the given number, counted from 1."""

    def __init__(self, device: torch.device, number: int) -> None:
        super().__init__(device)
        self._number = number

    def record(self, work: Work) -> tuple[Results, Callable[[], None]]:
        found = super().record(work)
        if self.recorded == self._number:
            raise RuntimeError("operation not permitted when stream is capturing\nand more lines")
        return found

"""Recorders for CPUs: what CUDA graphs do to memory, without CUDA."""

from __future__ import annotations

from collections.abc import Callable

import torch

from launch.graphs import Results, Work


class ReplayOnCpu:
    """Runs the recorded work again at every replay and writes the results into the memory of the first run."""

    def __init__(self, device: torch.device) -> None:
        self.recorded = self.replayed = 0
        self.released = False

    def warm_up(self, work: Callable[[], object]) -> None:
        work()

    def record(self, work: Work) -> tuple[Results, Callable[[], None]]:
        static = work()
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            for target, value in zip(static, work(), strict=True):
                if target is not None:
                    target.copy_(value)

        return static, replay

    def release(self) -> None:
        self.released = True


class FailsAt(ReplayOnCpu):
    """Fails at the capture of this number, counted from 1."""

    def __init__(self, device: torch.device, number: int) -> None:
        super().__init__(device)
        self._number = number

    def record(self, work: Work) -> tuple[Results, Callable[[], None]]:
        found = super().record(work)
        if self.recorded == self._number:
            raise RuntimeError("operation not permitted when stream is capturing\nand more lines")
        return found

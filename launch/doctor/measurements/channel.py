"""Process groups for the measurements: an error or a timeout in them does not affect the training's group."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from launch.machine.device_peaks import synchronize
from launch.machine.world import World

T = TypeVar("T")

GLOO_TIMEOUT = timedelta(seconds=45)
"""Longer than the measurements that a rank makes between two messages."""


@dataclass(frozen=True)
class Channel:
    """Collectives and messages of all ranks. Every method returns when this rank's device has finished.

    Values are exchanged with gloo: if a rank ends with an error, its connections close, and the others get an error
    too. With NCCL they would wait.
    """

    world: World
    values: dist.ProcessGroup | None
    """Exchanges values, in the memory of the hosts."""
    group: dist.ProcessGroup | None
    """Exchanges the tensors that are measured."""
    device: torch.device
    """Device of the tensors that are sent: the GPU with NCCL, else the CPU."""

    def align(self) -> None:
        """Wait for all ranks, so that they measure at the same time. Collective."""
        self.largest(0.0)

    def largest(self, value: float) -> float:
        """Return the largest of the ranks' values. Collective."""
        if self.world.size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.values)
        return float(tensor.item())

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, ordered by rank. Collective. Values are pickled."""
        return self.world.gather(value, self.values)

    def gather_number(self, value: int) -> list[int]:
        """Return the int64 of every rank, with one message per rank. Collective."""
        own = torch.tensor([value], dtype=torch.int64)
        found = [torch.empty_like(own) for _ in range(self.world.size)]
        dist.all_gather(found, own, group=self.values)
        return [int(one.item()) for one in found]

    def all_reduce(self, tensor: torch.Tensor) -> None:
        dist.all_reduce(tensor, group=self.group)
        synchronize(self.device)

    def send(self, tensor: torch.Tensor, rank: int) -> None:
        dist.send(tensor, rank, group=self.group)
        synchronize(self.device)

    def receive(self, tensor: torch.Tensor, rank: int) -> None:
        dist.recv(tensor, rank, group=self.group)
        synchronize(self.device)


@contextlib.contextmanager
def open_channel(world: World, nccl_timeout: timedelta) -> Iterator[Channel]:
    """Create process groups for the measurements, and destroy them afterwards. Collective.

    gloo raises an error after `GLOO_TIMEOUT` without progress.

    Args:
        nccl_timeout: time after which NCCL ends the process if a collective makes no progress.
    """
    if world.size == 1:
        yield Channel(world, None, None, world.device)
        return
    nccl = dist.get_backend() == "nccl"
    with (
        _new_group(dist.get_backend(), nccl_timeout if nccl else GLOO_TIMEOUT) as group,
        _new_group("gloo", GLOO_TIMEOUT) as values,  # destroyed first, because destroying a group of NCCL may wait
    ):
        yield Channel(world, values, group, world.device if nccl else torch.device("cpu"))


@contextlib.contextmanager
def _new_group(backend: str, timeout: timedelta) -> Iterator[dist.ProcessGroup]:
    group = dist.new_group(backend=backend, timeout=timeout)
    assert group is not None
    try:
        yield group
    finally:
        dist.destroy_process_group(group)

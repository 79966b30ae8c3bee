"""This process among all: rank, device, process group, and what accelerator-dependent defaults come to on it."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist

from shards.errors import UserError


@dataclass(frozen=True)
class World:
    """This process among all."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()


def connect() -> World:
    """Join the other processes of this launch (by torchrun's environment variables, as accelerate sets them)."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    backend = "gloo"
    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        # More local ranks than GPUs share them, which NCCL refuses and gloo allows (tests of several ranks on one GPU).
        device = torch.device("cuda", local_rank % gpus)
        torch.cuda.set_device(device)
        backend = "nccl" if local_size <= gpus else "gloo"
    else:
        device = torch.device("cpu")
        # Launchers set OMP_NUM_THREADS=1; a rank's share of the cores is what it should be.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    if size > 1 and not dist.is_initialized():
        dist.init_process_group(backend)
    return World(rank, size, local_rank, local_size, device)


def all_equal(value: int, world: World) -> bool:
    """Whether all ranks hold the same 63-bit value. Collective."""
    if world.size == 1:
        return True
    ends = torch.tensor([value, -value], dtype=torch.int64, device=world.device)
    dist.all_reduce(ends, op=dist.ReduceOp.MAX)
    return int(ends[0]) == -int(ends[1])


def disconnect() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def report_error(error: UserError) -> int:
    """Print one line and return the exit status. All ranks may find the same fault; rank 0's word is the plain one."""
    rank = int(os.environ.get("RANK", "0"))
    print(f"{f'rank {rank}: ' if rank else ''}error: {error}", file=sys.stderr, flush=True)
    return error.exit_code

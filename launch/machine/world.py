"""This process among all: rank, device, process group, and what accelerator-dependent defaults come to on it."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from launch.machine import affinity, network
from launch.machine.accelerate_settings import override_accelerate
from launch.machine.launcher_check import check_launcher
from shards.cores import cores
from shards.errors import UserError, open_files_error, report
from shards.files.temporary import prepare_caches
from shards.open_files import raise_limit
from shards.redact import printable, protect_output, redacted_traceback

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among all."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    cores: int = field(default_factory=cores)
    """This rank's share of the cores: how many threads each of its parts uses."""
    host: str = field(default_factory=network.host_name)
    rank0: network.Address | None = None
    """Address of rank 0's host; None for a single process."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in the order of ranks. Collective; pickles them."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values


def connect(*, numa_binding: bool = True, local_size: int | None = None) -> World:
    """Join the other processes of this launch (by torchrun's environment variables, as accelerate sets them).

    Args:
        numa_binding: hold each rank to the cores near its GPU.
        local_size: processes among which this machine's cores are divided. None = those of this launch; another number
            lets one process measure what a rank of so many would have.

    Raises:
        UserError: one of several processes without a launcher, or no usable folder for caches.
        RendezvousError: the processes do not find one another.
    """
    check_launcher()
    overruled = override_accelerate(os.environ, cuda=torch.cuda.is_available())
    prepare_caches()
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if overruled and rank == 0:
        print(printable(overruled), file=sys.stderr, flush=True)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = local_size or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device("cuda", local_rank % gpus) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    # More local ranks than GPUs share them, which NCCL refuses and gloo allows (tests of several ranks on one GPU).
    backend = "nccl" if gpus and local_size <= gpus else "gloo"
    if gpus and backend == "gloo":
        # accelerate and DeepSpeed take the device of this number, and would look for one GPU per rank.
        os.environ["LOCAL_RANK"] = str(device.index)
        os.environ["ACCELERATE_BYPASS_DEVICE_MAP"] = "true"
    placed = [rank % gpus for rank in range(local_size)] if gpus and numa_binding else None
    threads = affinity.bind(local_rank, local_size, placed)
    rank0 = None
    if size > 1:
        rank0 = network.rank0_address(os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", ""))
    if size > 1 and not dist.is_initialized():
        network.join(backend, rank0, several_hosts=local_size < size)
    return World(rank, size, local_rank, local_size, device, threads, rank0=rank0)


def broadcast_from_rank0(make: Callable[[], T], world: World) -> T:
    """Call `make` on rank 0 and return its result on every rank; its exception is raised on all. Collective."""
    if world.size == 1:
        return make()
    box: list[Any] = [None, None]
    if world.is_main:
        try:
            box[0] = make()
        except Exception as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0, device=world.device)
    if box[1] is not None:
        raise box[1]
    return cast(T, box[0])


def disconnect() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        gc.collect()  # NCCL waits for the end of CUDA graphs that hold its collectives
        dist.destroy_process_group()


def run_command(command: Callable[[], int]) -> int:
    """Run a command of one rank; returns its exit status and prints one line for bad input.

    A rank that fails while others run on must call `os._exit`: leaving NCCL's group waits for the peers, which wait for
    this rank, and the launcher, which would end them, waits for it to exit.
    """
    protect_output()
    raise_limit()
    rank, status = os.environ.get("RANK", "0"), 1
    prefix = "" if rank == "0" else f"rank {rank}: "
    try:
        status = command()
        disconnect()
        return status
    except UserError as error:
        status = report(error, prefix=prefix)
    except Exception as error:
        if (judged := open_files_error(error)) is not None:
            report(judged, prefix=prefix)
        else:
            print(redacted_traceback(error), end="", file=sys.stderr, flush=True)
    if dist.is_initialized() and dist.get_world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    disconnect()
    return status

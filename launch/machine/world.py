"""The process group, and the rank, device and CPU cores of this process."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from launch.machine import affinity, network, rank_errors
from launch.machine.accelerate_settings import override_accelerate
from launch.machine.launcher_check import check_launcher
from shards.command import failed_output
from shards.cores import cores
from shards.errors import UserError, open_files_error
from shards.files.temporary import prepare_caches
from shards.open_files import raise_limit
from shards.redact import printable, protect_output

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """Rank, device and host of this process."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    cores: int = field(default_factory=cores)
    """CPU cores per rank, and the number of threads that the decoder, torch and OpenMP use each."""
    host: str = field(default_factory=network.host_name)
    rank0: network.Address | None = None
    """Address of rank 0's host; None for a single process."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, value: T, group: dist.ProcessGroup | None = None) -> list[T]:
        """Return the values of all ranks, ordered by rank. Collective. Values are pickled.

        Args:
            group: process group of all ranks; None: the default group.
        """
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=group)
        return values


def connect(
    *, numa_binding: bool = True, local_size: int | None = None, timeout: timedelta = network.START_TIMEOUT
) -> World:
    """Create the process group of this launch from torchrun's environment variables, which accelerate sets too.

    Args:
        numa_binding: bind each rank to the cores near its GPU.
        local_size: number of processes among which this machine's cores are divided. None: the processes of this
            launch. Another number lets a single process measure the throughput of one of that many ranks.
        timeout: how long to wait for the other ranks, now and in collectives.

    Raises:
        UserError: several processes were started without a launcher, or no folder for caches is usable.
        RendezvousError: the ranks could not connect to each other.
    """
    check_launcher()
    note = override_accelerate(os.environ, cuda=torch.cuda.is_available())
    prepare_caches()
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if note and rank == 0:
        print(printable(note), file=sys.stderr, flush=True)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = local_size or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device("cuda", local_rank % gpus) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    # NCCL rejects several ranks on one GPU; gloo allows them (tests of several ranks on one GPU).
    backend = "nccl" if gpus and local_size <= gpus else "gloo"
    if gpus and backend == "gloo":
        # accelerate and DeepSpeed use LOCAL_RANK as the device index, and expect one GPU per rank.
        os.environ["LOCAL_RANK"] = str(device.index)
        os.environ["ACCELERATE_BYPASS_DEVICE_MAP"] = "true"
    gpu_of_rank = [rank % gpus for rank in range(local_size)] if gpus and numa_binding else None
    threads = affinity.bind(local_rank, local_size, gpu_of_rank)
    rank0 = None
    if size > 1:
        rank0 = network.rank0_address(os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", ""))
    if size > 1 and not dist.is_initialized():
        network.join(backend, rank0, several_hosts=local_size < size, timeout=timeout)
    return World(rank, size, local_rank, local_size, device, threads, rank0=rank0)


def broadcast_from_rank0(make: Callable[[], T], world: World) -> T:
    """Call `make` on rank 0 and return its result on every rank, or raise its exception on every rank. Collective."""
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
    """Destroy the process group, if there is one."""
    if dist.is_initialized():
        gc.collect()  # free CUDA graphs that contain collectives: destroying an NCCL group waits for such graphs
        dist.destroy_process_group()


def run_command(command: Callable[[], int], *, ended: Callable[[], bool] = lambda: False) -> int:
    """Run one rank's command and return its exit status; errors in the input are reported in one line.

    Args:
        ended: returns whether the launcher has already asked this rank to end, for a command that handles SIGTERM.

    A rank that fails while others continue must call `os._exit`: destroying the NCCL group waits for the other ranks,
    which wait for this rank, and the launcher, which would end them, waits for this process to exit.
    """
    protect_output()
    raise_limit()
    status = 1
    try:
        status = command()
        disconnect()
    except SystemExit as end:  # wrong usage, or --help
        if end.code and rank_errors.follows_rank0():
            rank_errors.wait_for_end()
        raise
    except UserError as error:
        status = error.exit_code
        rank_errors.report_user_error(error)
    except Exception as error:
        if (failed := failed_output(error)) is not None:
            status = failed
        elif (explained := open_files_error(error)) is not None:
            rank_errors.report_user_error(explained)
        else:
            rank_errors.report_unexpected(error, ended)
    else:
        if status and rank_errors.follows_rank0():
            rank_errors.wait_for_end()  # so that the launcher does not end rank 0 before it has ended in order
        return status
    if dist.is_initialized() and dist.get_world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    disconnect()
    return status

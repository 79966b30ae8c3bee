"""Properties of this host: cores, memory, /dev/shm, limits and versions."""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path

from launch.doctor.measurements.report import NodeReport
from launch.machine.provenance import libraries
from launch.machine.world import World
from launch.resilience.preflight import source_hash
from shards.cores import quota
from shards.memory import free_memory, machine_memory

SHM = Path("/dev/shm")


def describe_node(world: World, *, cores: int, load: float) -> NodeReport:
    """Return the properties of this host.

    Args:
        cores: CPU cores that the ranks of this host may use together.
        load: load average before the measurements.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shm = shutil.disk_usage(SHM) if SHM.is_dir() else None
    total = os.cpu_count() or cores
    return NodeReport(
        host=world.host,
        first_rank=world.rank,
        local_ranks=world.local_size,
        cores=cores,
        cores_total=total,
        cores_limit=_cores_limit(cores, total),
        rank_cores=world.cores,
        memory=machine_memory(),
        memory_free=free_memory(),
        shm=shm.total if shm else None,
        shm_free=shm.free if shm else None,
        open_files=-1 if soft == resource.RLIM_INFINITY else soft,
        open_files_hard=-1 if hard == resource.RLIM_INFINITY else hard,
        load=load,
        libraries=libraries(),
        code=source_hash(),
    )


def _cores_limit(cores: int, total: int) -> str | None:
    allowed = quota()
    if allowed is not None and allowed <= cores and allowed < total:
        return "CPU quota"
    return "CPU mask" if cores < total else None

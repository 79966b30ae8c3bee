"""Which cores a rank uses: those that it was given (SLURM's mask, a cgroup, taskset), and of them those near its GPU.

A process is held to the cores of its GPU's NUMA node. Linux then takes its memory from that node too, as its default is
the node of the core that first touches a page. Ranks near the same node share its cores: exclusive slices gain nothing
measurable and collide as soon as two jobs share a machine.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shards.cores import quota

NODES = Path("/sys/devices/system/node")


@dataclass(frozen=True)
class Cores:
    """What one rank has."""

    allowed: frozenset[int]
    """Logical CPUs that it may run on."""
    threads: int
    """Its fair share of them: how many threads the decoder, torch and OpenMP each use."""


def choose(
    allowed: frozenset[int],
    nodes: Mapping[int, frozenset[int]],
    near: Sequence[int | None],
    local_rank: int,
    quota: int | None = None,
) -> Cores:
    """The cores of a local rank.

    Args:
        allowed: what the process was given.
        nodes: NUMA node -> its logical CPUs.
        near: per local rank, the NUMA node of its GPU; None = unknown, or no GPU.
        local_rank: whose.
        quota: cores' worth of time that all local ranks together may use; None = as much as there is.
    """
    count = len(near)
    here = near[local_rank]
    paid = math.inf if quota is None else quota / count
    everywhere = Cores(allowed, max(1, int(min(len(allowed) / count, paid))))
    if here is None or count == 1:  # alone on a machine, the far cores are better than none
        return everywhere
    reachable = {node: nodes.get(node, frozenset()) & allowed for node in set(near) if node is not None}
    neighbours = sum(node == here for node in near)
    if None in near or any(len(reachable[node]) < near.count(node) for node in reachable):
        return everywhere  # the mask leaves some rank without a core of its own nearby
    return Cores(reachable[here], max(1, int(min(len(reachable[here]) / neighbours, paid))))


def bind(local_rank: int, local_size: int, gpus: Sequence[int] | None) -> Cores:
    """Hold this process, with the threads it has already, to its cores, and set torch's and OpenMP's thread counts.

    Args:
        gpus: CUDA device of each local rank; None = they have none.
    """
    allowed = frozenset(os.sched_getaffinity(0))
    near = [gpu_node(gpu) for gpu in gpus] if gpus else [None] * local_size
    cores = choose(allowed, numa_nodes(), near, local_rank, quota())
    if cores.allowed != allowed:
        for thread in Path("/proc/self/task").iterdir():
            try:
                os.sched_setaffinity(int(thread.name), cores.allowed)
            except ProcessLookupError:  # it has ended meanwhile
                continue
    # Launchers set OMP_NUM_THREADS=1 whatever the machine; libraries that are loaded from here on read this.
    os.environ["OMP_NUM_THREADS"] = str(cores.threads)
    torch.set_num_threads(cores.threads)
    return cores


def numa_nodes() -> dict[int, frozenset[int]]:
    """NUMA node -> logical CPUs, as the kernel says; {} where it does not."""
    return {
        int(folder.name.removeprefix("node")): parse_list((folder / "cpulist").read_text())
        for folder in NODES.glob("node[0-9]*")
    }


def gpu_node(device: int) -> int | None:
    """The NUMA node of a CUDA device; None where the kernel does not say (one socket, some virtual machines)."""
    found: Any = torch.cuda.get_device_properties(device)
    address = f"{found.pci_domain_id:04x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"
    try:
        node = int((Path("/sys/bus/pci/devices") / address / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def parse_list(text: str) -> frozenset[int]:
    """The kernel's list format: '0-3,8' -> {0, 1, 2, 3, 8}."""
    cpus: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus |= set(range(int(first), int(last or first) + 1))
    return frozenset(cpus)

"""Which cores a rank uses: those that it was given (SLURM's mask, a cgroup, taskset), and of them those near its GPU.

A process is held to the cores of its GPU's NUMA node. Linux then takes its memory from that node too, as its default is
the node of the core that first touches a page. Ranks near the same node share its cores: exclusive slices gain nothing
measurable and collide as soon as two jobs share a machine.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from shards.cores import quota

PCI_DEVICES = Path("/sys/bus/pci/devices")


def bind(local_rank: int, local_size: int, gpus: Sequence[int] | None) -> int:
    """Hold this process, with the threads it has already, to its cores, and set torch's and OpenMP's thread counts.

    Args:
        gpus: CUDA device of each local rank; None = they have none.

    Returns:
        How many threads the decoder, torch and OpenMP each use.
    """
    allowed = frozenset(os.sched_getaffinity(0))
    near = [cores_near(gpu) for gpu in gpus] if gpus else [frozenset[int]()] * local_size
    cores, threads = choose(allowed, near, local_rank, quota())
    if cores != allowed:
        for thread in Path("/proc/self/task").iterdir():
            try:
                os.sched_setaffinity(int(thread.name), cores)
            except ProcessLookupError:  # it has ended meanwhile
                continue
    # Launchers set OMP_NUM_THREADS=1 whatever the machine; libraries that are loaded from here on read this.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    return threads


def choose(
    allowed: frozenset[int], near: Sequence[frozenset[int]], local_rank: int, quota: int | None = None
) -> tuple[frozenset[int], int]:
    """Return the logical CPUs that a local rank may run on, and its fair share of them as a number of threads.

    Args:
        allowed: what the process was given.
        near: per local rank, the logical CPUs near its GPU; empty = unknown, or no GPU.
        local_rank: whose.
        quota: cores' worth of time that all local ranks together may use; None = as much as there is.
    """
    sharing = len(near)
    nearby = [cpus & allowed for cpus in near]
    # Alone on a machine, the far cores are better than none. All ranks share all cores where the mask leaves some rank
    # without a core of its own nearby.
    if sharing > 1 and all(len(cpus) >= nearby.count(cpus) for cpus in nearby):
        allowed, sharing = nearby[local_rank], nearby.count(nearby[local_rank])
    paid = math.inf if quota is None else quota / len(near)
    return allowed, max(1, int(min(len(allowed) / sharing, paid)))


def cores_near(device: int) -> frozenset[int]:
    """Return the logical CPUs of a CUDA device's NUMA node: all where it has none, empty where that is not known."""
    found: Any = torch.cuda.get_device_properties(device)
    address = f"{found.pci_domain_id:04x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"
    try:
        return parse_list((PCI_DEVICES / address / "local_cpulist").read_text())
    except (OSError, ValueError):
        return frozenset()


def parse_list(text: str) -> frozenset[int]:
    """Parse the kernel's list format: '0-3,8' -> {0, 1, 2, 3, 8}."""
    cpus: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus |= set(range(int(first), int(last or first) + 1))
    return frozenset(cpus)

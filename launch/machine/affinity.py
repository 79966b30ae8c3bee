"""CPU affinity: bind each rank to the NUMA node of its GPU, within the cores that the process may use.

SLURM, a cgroup or taskset decides which cores a process may use. Binding it to the cores of one NUMA node also places
its memory there, because Linux allocates a page on the node of the core that first touches it. Ranks whose GPUs are on
the same node share its cores: disjoint slices gave no measurable speed-up, and would collide when two jobs share a
machine.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from shards.cores import quota

# Variables with the number of processes in which torch.compile, and ninja for extensions such as DeepSpeed's, compile.
# Their defaults do not know of CPU quotas, nor of other ranks.
COMPILERS = ("TORCHINDUCTOR_COMPILE_THREADS", "MAX_JOBS")
PCI_DEVICES = Path("/sys/bus/pci/devices")


def bind(local_rank: int, local_size: int, gpus: Sequence[int] | None) -> int:
    """Bind this process and its existing threads to its cores, and set the thread counts of torch and OpenMP.

    Args:
        gpus: CUDA device of each local rank; None: no binding to a NUMA node.

    Returns:
        The number of threads that the decoder, torch and OpenMP use each.
    """
    allowed = frozenset(os.sched_getaffinity(0))
    near = [cores_near(gpu) for gpu in gpus] if gpus else [frozenset[int]()] * local_size
    cores, threads = choose(allowed, near, local_rank, quota())
    if cores != allowed:
        for thread in Path("/proc/self/task").iterdir():
            try:
                os.sched_setaffinity(int(thread.name), cores)
            except ProcessLookupError:  # the thread has ended in the meantime
                continue
    # Replace the OMP_NUM_THREADS=1 that launchers set: libraries that are loaded later read this variable.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    for name in COMPILERS:
        os.environ.setdefault(name, str(threads))
    torch.set_num_threads(threads)
    return threads


def choose(
    allowed: frozenset[int], near: Sequence[frozenset[int]], local_rank: int, quota: int | None = None
) -> tuple[frozenset[int], int]:
    """Return the logical CPUs for a local rank, and the number of threads for it.

    Args:
        allowed: logical CPUs that the process may use.
        near: logical CPUs near the GPU of each local rank; empty: unknown, or no GPU.
        local_rank: rank to choose for.
        quota: CPU limit of all local ranks together, in cores; None: no limit.
    """
    sharing = len(near)
    nearby = [cpus & allowed for cpus in near]
    # A single rank uses the cores of all NUMA nodes, because no other rank does. Several ranks share the cores of all
    # NUMA nodes if some node has fewer allowed cores than ranks.
    if sharing > 1 and all(len(cpus) >= nearby.count(cpus) for cpus in nearby):
        allowed, sharing = nearby[local_rank], nearby.count(nearby[local_rank])
    limit = math.inf if quota is None else quota / len(near)
    return allowed, max(1, int(min(len(allowed) / sharing, limit)))


def cores_near(device: int) -> frozenset[int]:
    """Return the logical CPUs of a CUDA device's NUMA node: all CPUs if it has none, empty if unknown."""
    try:
        return parse_list((PCI_DEVICES / pci_address(device, domain_digits=4) / "local_cpulist").read_text())
    except (OSError, ValueError):
        return frozenset()


def pci_address(device: int | torch.device, *, domain_digits: int) -> str:
    """Return the PCI address of a CUDA device.

    Args:
        domain_digits: hexadecimal digits of the PCI domain: 4 in the kernel's names, 8 in those of nvidia-smi.
    """
    found: Any = torch.cuda.get_device_properties(device)
    return f"{found.pci_domain_id:0{domain_digits}x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"


def parse_list(text: str) -> frozenset[int]:
    """Parse the kernel's list format: '0-3,8' -> {0, 1, 2, 3, 8}."""
    cpus: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus |= set(range(int(first), int(last or first) + 1))
    return frozenset(cpus)

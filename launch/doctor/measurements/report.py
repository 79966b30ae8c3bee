"""What `pipeline doctor` measures, as written to its JSON file. A field is None if it was not measured."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class NodeReport:
    """Properties of one host. Sizes are in bytes."""

    host: str
    first_rank: int
    local_ranks: int
    cores: int
    """CPU cores that the ranks of this host may use together."""
    cores_total: int
    """CPU cores of the machine."""
    cores_limit: str | None
    """What reduces `cores`: CPU quota, or CPU mask (cpuset or affinity)."""
    rank_cores: int
    """CPU cores of one rank."""
    memory: int
    """Memory of the machine, or the limit of the control group."""
    memory_free: int
    shm: int | None
    """Size of /dev/shm."""
    shm_free: int | None
    open_files: int
    """Limit of open files that a command of this project sets for itself; -1: no limit."""
    open_files_hard: int
    """Hard limit of open files; -1: no limit."""
    load: float
    """Load average of the last minute, before the measurements."""
    libraries: str
    code: str
    """Hash of this project's source files."""
    driver: str | None = None
    """Version of the GPU driver."""
    clock_offset: float | None = None
    """Seconds by which the clock is ahead of that of rank 0."""
    clock_error: float | None = None
    """Largest error of `clock_offset`, in seconds."""


@dataclass(frozen=True, kw_only=True)
class GpuState:
    """State of a GPU during a matrix multiplication, from nvidia-smi."""

    driver: str
    clock: int | None
    """Clock of the multiprocessors in MHz."""
    max_clock: int | None
    memory_clock: int | None
    max_memory_clock: int | None
    temperature: int | None
    """Degrees Celsius."""
    throttle_reasons: tuple[str, ...]
    ecc_uncorrected: int | None
    """Uncorrected memory errors since the driver was loaded."""


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """Measurements of one rank."""

    rank: int
    host: str
    device: str
    device_name: str
    gpu: GpuState | None = None
    matmul: float | None = None
    """FLOP/s of a matrix multiplication: bf16 on a GPU, float32 on all CPU cores of the rank."""
    copy: float | None = None
    """Memory bandwidth of a copy in bytes/s: bytes read plus bytes written."""
    cpu_received: float | None = None
    """CPU time of threads that multiply matrices on the CPU cores of the rank, as a fraction of their wall time. Less
    than 1: a CPU quota or other processes stop them."""
    throttled: float | None = None
    """Fraction of the CPU quota's periods in which it stopped the process; None without a quota."""
    read: float | None = None
    """Bytes/s from the storage of the shards, without the page cache."""
    decode: float | None = None
    """Images/s that all cores of the rank decode: the speed of one core times their number."""
    errors: tuple[str, ...] = ()
    """Measurements that failed, with the reason."""


@dataclass(frozen=True, kw_only=True)
class AllReduce:
    """An all-reduce over all ranks."""

    bytes: int
    seconds: float
    bus_bandwidth: float
    """2 (n - 1) / n x bytes / seconds for n ranks, as in nccl-tests: the bytes/s that each link carries."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Messages between the first ranks of two hosts."""

    hosts: tuple[str, str]
    latency: float
    """Half of the shortest round trip of a small message, in seconds."""
    bandwidth: float
    """Bytes/s of the slower direction."""


@dataclass(frozen=True, kw_only=True)
class NetworkReport:
    """Measurements between the ranks."""

    latency: float
    """Seconds of an all-reduce of 8 bytes."""
    all_reduce: tuple[AllReduce, ...]
    pairs: tuple[Pair, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Report:
    """All measurements of a job."""

    data: str | None
    """Shard set; None: not measured."""
    nodes: tuple[NodeReport, ...]
    ranks: tuple[RankReport, ...]
    network: NetworkReport | None
    """None for a single rank."""
    seconds: float
    """Duration of the measurements."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

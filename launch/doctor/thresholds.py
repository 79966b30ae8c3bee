"""Limits beyond which `pipeline doctor` reports a host or a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Interval

from shards.ranges import Fraction, Seconds, check_ranges


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Limits of measurements. The median is that of the job's ranks with the same device, or of its hosts."""

    slow: Fraction = 0.85
    """Report a rank whose matrix multiplication or memory copy, or a host whose number of cores or memory, is below
    this fraction of the median."""
    slow_network: Fraction = 0.5
    """Report a host whose bandwidth to other hosts is below this fraction of the median."""
    slow_input: Fraction = 0.5
    """Report a host that reads shards, or decodes images, at less than this fraction of the median."""
    max_latency_ratio: Annotated[float, Interval(ge=1, le=1e6)] = 3.0
    """Report a host whose latency to other hosts is above this multiple of the median, and 0.5 ms above it."""
    max_latency: Seconds = 0.005
    """Report a host whose latency to other hosts is longer, in seconds."""
    min_bandwidth: Annotated[float, Interval(ge=0, le=1e6)] = 0.1
    """Report a host whose bandwidth to other hosts is below this number of GB/s. 1 Gbit/s Ethernet has 0.12."""
    max_skew: Seconds = 1.0
    """Report a host whose clock differs by more seconds from the median of the hosts."""
    min_open_files: Annotated[int, Interval(ge=0, le=2**31)] = 4096
    """Report a host whose limit of open files is lower."""
    min_shm: Annotated[float, Interval(ge=0, le=1e6)] = 0.5
    """Report a host with several GPUs whose /dev/shm is smaller, in GiB. NCCL uses it between the GPUs of a host."""

    def __post_init__(self) -> None:
        check_ranges(self)

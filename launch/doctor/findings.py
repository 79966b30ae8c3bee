"""Find slow and misconfigured hosts in the measurements, and name them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from launch.doctor.measurements.nvidia_smi import EXPECTED_REASONS
from launch.doctor.measurements.report import NodeReport, Pair, RankReport, Report
from launch.doctor.thresholds import Thresholds
from launch.doctor.units import bandwidth, bytes_text, flops, latency
from launch.resilience.preflight import MIN_CORES_PER_GPU, minority, one_core_per_gpu, unlike_majority
from shards.memory import GIB

E = TypeVar("E")

LATENCY_NOISE = 0.0005  # seconds: differences of latencies below this are not reported
# The scheduler of the system divides cores evenly, but not over less than a second.
MIN_CPU_RECEIVED = 0.5
"""Smallest fraction of the median of `cpu_received`."""
MIN_CPU_COPY = 0.6
"""Smallest fraction of the median of a memory copy on a CPU, whose memory other processes use too."""
THROTTLED_RECEIVED = 0.9
"""Largest `cpu_received` of a process that its CPU quota slows down."""

Kind = Literal[
    "versions", "cores", "cores-per-gpu", "memory", "shm", "open-files", "clock-skew", "failed", "matmul", "copy",
    "cpu-quota", "cpu-load", "gpu-throttled", "gpu-memory-errors", "latency", "bandwidth", "read", "decode",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A slow or misconfigured host or device."""

    kind: Kind
    hosts: tuple[str, ...]
    message: str
    rank: int | None = None
    """The rank, if the finding is about one device."""
    value: float | None = None
    """The figure, in bytes, seconds, bytes/s, FLOP/s, images/s or a number of cores or files."""
    median: float | None = None
    """The median to which `value` is compared; None: the limit is an absolute one."""


def find(report: Report, limits: Thresholds) -> list[Finding]:
    """Return the findings, ordered by kind."""
    return [*_hosts(report, limits), *_devices(report, limits), *_network(report, limits), *_input(report, limits)]


def hosts_to_exclude(findings: Iterable[Finding], report: Report) -> list[str]:
    """Return the hosts that are named alone in a finding, if they are a minority of the hosts."""
    named = {finding.hosts[0] for finding in findings if len(finding.hosts) == 1}
    return sorted(minority(named, len(report.nodes)))


def exclude_option(hosts: Sequence[str]) -> str:
    """Return the option of sbatch and srun that excludes the hosts."""
    return f"--exclude={','.join(hosts)}"


# -- hosts -------------------------------------------------------------------------------------------------------------


def _hosts(report: Report, limits: Thresholds) -> Iterator[Finding]:
    nodes = report.nodes
    if not nodes:
        return
    for what, values in (
        ("code", [(node.host, node.code) for node in nodes]),
        ("libraries", [(node.host, node.libraries) for node in nodes]),
        ("GPU driver", [(node.host, node.driver) for node in nodes if node.driver is not None]),
    ):
        for host, difference in unlike_majority(what, values):
            yield Finding(kind="versions", hosts=(host,), message=f"{host}: {difference}; install the same version")
    for alike in _with_same_device(report):
        yield from _few_cores(alike, limits)
        for node, value, median in _below(alike, lambda node: float(node.memory), limits.slow):
            text = f"{node.host}: {bytes_text(value)} of memory, {_compared(value, median, bytes_text)}"
            yield Finding(kind="memory", hosts=(node.host,), message=text, value=value, median=median)
    gpu_hosts = {rank.host for rank in report.ranks if _is_gpu(rank)}
    short = [node.host for node in nodes if node.host in gpu_hosts and node.rank_cores < MIN_CORES_PER_GPU]
    if short:
        yield Finding(kind="cores-per-gpu", hosts=tuple(short), message=one_core_per_gpu(short))
    for node in nodes:
        if node.shm is not None and node.host in gpu_hosts and node.local_ranks > 1 and node.shm < limits.min_shm * GIB:
            yield Finding(
                kind="shm",
                hosts=(node.host,),
                value=node.shm,
                message=f"{node.host}: /dev/shm has {bytes_text(node.shm)}, less than {limits.min_shm:g} GiB; mount a "
                "larger one, or start the container with --shm-size",
            )
        if 0 <= node.open_files < limits.min_open_files:
            yield Finding(
                kind="open-files",
                hosts=(node.host,),
                value=node.open_files,
                message=f"{node.host}: the limit of open files is {node.open_files:,} (hard limit "
                f"{node.open_files_hard:,}), less than {limits.min_open_files:,}; raise it with 'ulimit -n', or in "
                "/etc/security/limits.conf",
            )
    yield from _skewed_clocks(nodes, limits)
    for rank in report.ranks:
        for error in rank.errors:
            yield Finding(
                kind="failed", hosts=(rank.host,), rank=rank.rank, message=f"{_name(rank)}: not measured: {error}"
            )


def _with_same_device(report: Report) -> list[list[NodeReport]]:
    """Return the hosts by device: a cluster may have several types of hosts, with other numbers of cores."""
    devices = {rank.host: rank.device_name for rank in report.ranks}
    groups: dict[str | None, list[NodeReport]] = {}
    for node in report.nodes:
        groups.setdefault(devices.get(node.host), []).append(node)
    return list(groups.values())


def _few_cores(nodes: Sequence[NodeReport], limits: Thresholds) -> Iterator[Finding]:
    for node, value, median in _below(nodes, lambda node: float(node.cores), limits.slow):
        reason = f" ({node.cores_limit})" if node.cores_limit else ""
        yield Finding(
            kind="cores",
            hosts=(node.host,),
            value=value,
            median=median,
            message=f"{node.host}: {node.cores} of {node.cores_total} CPU cores usable{reason}, median of the hosts "
            f"{median:g}",
        )


def _skewed_clocks(nodes: Sequence[NodeReport], limits: Thresholds) -> Iterator[Finding]:
    known = [node for node in nodes if node.clock_offset is not None]
    # The median is the reference, because the clock of rank 0 may be the wrong one.
    median = statistics.median([node.clock_offset or 0.0 for node in known]) if known else 0.0
    for node in known:
        skew = (node.clock_offset or 0.0) - median
        if abs(skew) > limits.max_skew + (node.clock_error or 0.0):
            yield Finding(
                kind="clock-skew",
                hosts=(node.host,),
                value=skew,
                message=f"{node.host}: its clock is {abs(skew):.2f} s {'ahead of' if skew > 0 else 'behind'} the "
                f"median of the hosts, more than {limits.max_skew:g} s; check its NTP service",
            )


# -- devices -----------------------------------------------------------------------------------------------------------


def _devices(report: Report, limits: Thresholds) -> Iterator[Finding]:
    for device in dict.fromkeys(rank.device_name for rank in report.ranks):
        ranks = [rank for rank in report.ranks if rank.device_name == device]
        for rank, value, median in _below(ranks, lambda rank: rank.matmul, limits.slow):
            text = f"{_name(rank)}: matrix multiplication {flops(value)}, {_compared(value, median, flops)}"
            yield Finding(
                kind="matmul", hosts=(rank.host,), rank=rank.rank, value=value, median=median,
                message=text + _cause(rank, report.nodes),
            )  # fmt: skip
        least = limits.slow if _is_gpu(ranks[0]) else min(limits.slow, MIN_CPU_COPY)
        for rank, value, median in _below(ranks, lambda rank: rank.copy, least):
            text = f"{_name(rank)}: memory copy {bandwidth(value)}, {_compared(value, median, bandwidth)}"
            yield Finding(
                kind="copy", hosts=(rank.host,), rank=rank.rank, value=value, median=median,
                message=text + _cause(rank, report.nodes),
            )  # fmt: skip
    yield from _stopped_processes(report)
    for rank in report.ranks:
        if rank.gpu is None:
            continue
        reasons = [reason for reason in rank.gpu.throttle_reasons if reason not in EXPECTED_REASONS]
        if reasons:
            clocks = f"{rank.gpu.clock} of {rank.gpu.max_clock} MHz"
            text = f"{_name(rank)}: clocks reduced by {', '.join(reasons)} ({clocks}); check its cooling and power"
            yield Finding(kind="gpu-throttled", hosts=(rank.host,), rank=rank.rank, message=text)
        if rank.gpu.ecc_uncorrected:
            text = f"{_name(rank)}: {rank.gpu.ecc_uncorrected} uncorrected memory errors (ECC); reset or replace it"
            yield Finding(
                kind="gpu-memory-errors", hosts=(rank.host,), rank=rank.rank, value=rank.gpu.ecc_uncorrected,
                message=text,
            )  # fmt: skip


def _stopped_processes(report: Report) -> Iterator[Finding]:
    """Yield ranks that do not get the CPU time of their cores, because of a quota or of other processes."""
    slow = {rank.rank for rank, _, _ in _below(report.ranks, lambda rank: rank.cpu_received, MIN_CPU_RECEIVED)}
    for rank in report.ranks:
        received = rank.cpu_received
        if received is None:
            continue
        if rank.throttled and rank.throttled > 0.5 and received < THROTTLED_RECEIVED:
            yield Finding(
                kind="cpu-quota", hosts=(rank.host,), rank=rank.rank, value=received,
                message=f"{_name(rank)}: its CPU quota stops it: its threads ran in {received:.0%} of the time; give "
                "the job more cores (SLURM: --cpus-per-task; containers: --cpus)",
            )  # fmt: skip
        elif rank.rank in slow:
            yield Finding(
                kind="cpu-load", hosts=(rank.host,), rank=rank.rank, value=received,
                message=f"{_name(rank)}: other processes use its CPU cores: its threads ran in {received:.0%} of the "
                "time; find them with 'top'",
            )  # fmt: skip


def _cause(rank: RankReport, nodes: Sequence[NodeReport]) -> str:
    """Return why a rank on a CPU may be slow, for the end of a message."""
    node = next((node for node in nodes if node.host == rank.host), None)
    if _is_gpu(rank) or node is None or all(node.rank_cores >= other.rank_cores for other in nodes):
        return ""
    cores = f"{node.rank_cores} CPU core{'s' if node.rank_cores != 1 else ''}"
    return f"; it has {cores}{f' ({node.cores_limit})' if node.cores_limit else ''}"


# -- network -----------------------------------------------------------------------------------------------------------


def _network(report: Report, limits: Thresholds) -> Iterator[Finding]:
    if report.network is None or not report.network.pairs:
        return
    pairs = report.network.pairs
    measured: dict[tuple[str, ...], list[Pair]] = {}
    for host in dict.fromkeys(host for pair in pairs for host in pair.hosts):
        own = [pair for pair in pairs if host in pair.hosts]
        # Of a host's only pair, the other host may be the cause: both are named.
        measured[own[0].hosts if len(own) == 1 else (host,)] = own
    delays = {hosts: statistics.median_low([pair.latency for pair in own]) for hosts, own in measured.items()}
    rates = {hosts: statistics.median_high([pair.bandwidth for pair in own]) for hosts, own in measured.items()}
    delay, rate = statistics.median_low(delays.values()), statistics.median_high(rates.values())
    for hosts in measured:
        name, value = " and ".join(hosts), delays[hosts]
        to_others = "between them" if len(hosts) == 2 else "to other hosts"
        late = value > max(limits.max_latency_ratio * delay, delay + LATENCY_NOISE)
        if late or value > limits.max_latency:
            limit = _compared(value, delay, latency) if late else f"more than {latency(limits.max_latency)}"
            text = f"{name}: latency {to_others} {latency(value)}, {limit}"
            yield Finding(kind="latency", hosts=hosts, value=value, median=delay if late else None, message=text)
        value = rates[hosts]
        narrow = value < limits.slow_network * rate
        if narrow or value < 1e9 * limits.min_bandwidth:
            limit = _compared(value, rate, bandwidth) if narrow else f"less than {limits.min_bandwidth:g} GB/s"
            text = f"{name}: bandwidth {to_others} {bandwidth(value)}, {limit}"
            yield Finding(kind="bandwidth", hosts=hosts, value=value, median=rate if narrow else None, message=text)


# -- input -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _HostInput:
    host: str
    read: float | None
    decode: float | None


def _input(report: Report, limits: Thresholds) -> Iterator[Finding]:
    hosts = []
    for host in dict.fromkeys(rank.host for rank in report.ranks):
        ranks = [rank for rank in report.ranks if rank.host == host]
        hosts.append(_HostInput(host, _sum([rank.read for rank in ranks]), _sum([rank.decode for rank in ranks])))
    for entry, value, median in _below(hosts, lambda entry: entry.read, limits.slow_input):
        text = f"{entry.host}: reads shards at {bandwidth(value)}, {_compared(value, median, bandwidth)}"
        yield Finding(kind="read", hosts=(entry.host,), value=value, median=median, message=text)
    for entry, value, median in _below(hosts, lambda entry: entry.decode, limits.slow_input):
        text = f"{entry.host}: decodes {_images(value)}, {_compared(value, median, _images)}"
        yield Finding(kind="decode", hosts=(entry.host,), value=value, median=median, message=text)


def _images(rate: float) -> str:
    return f"{rate:,.0f} images/s"


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


# -- comparison --------------------------------------------------------------------------------------------------------


def _below(entries: Sequence[E], figure: Callable[[E], float | None], ratio: float) -> Iterator[tuple[E, float, float]]:
    """Yield (entry, its figure, median) of the entries whose figure is less than `ratio` times the median.

    It is the higher median, so that all ranks of one of two hosts can be slow.
    """
    known = [(entry, value) for entry in entries if (value := figure(entry)) is not None]
    median = statistics.median_high([value for _, value in known]) if known else 0.0
    for entry, value in known:
        if value < ratio * median:
            yield entry, value, median


def _compared(value: float, median: float, text: Callable[[float], str]) -> str:
    return f"median {text(median)}, ratio {value / median:.2f}"


def _name(rank: RankReport) -> str:
    return f"{rank.host} rank {rank.rank} ({rank.device}, {rank.device_name})"


def _is_gpu(rank: RankReport) -> bool:
    return rank.device != "cpu"

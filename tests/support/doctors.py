"""Measurements of a job, as `pipeline doctor` returns them, for tests of its findings and tables."""

from __future__ import annotations

from dataclasses import replace

from launch.doctor.measurements.report import (
    AllReduce,
    GpuState,
    NetworkReport,
    NodeReport,
    Pair,
    RankReport,
    Report,
)

GIB = 2**30
GPU = GpuState(
    driver="580.65.06", clock=1980, max_clock=1980, memory_clock=3201, max_memory_clock=3201, temperature=61,
    throttle_reasons=(), ecc_uncorrected=0,
)  # fmt: skip


def node(number: int, *, local_ranks: int = 2) -> NodeReport:
    """Return a host without faults."""
    return NodeReport(
        host=f"n{number}", first_rank=number * local_ranks, local_ranks=local_ranks, cores=32, cores_total=32,
        cores_limit=None, rank_cores=16, memory=256 * GIB, memory_free=200 * GIB, shm=128 * GIB, shm_free=128 * GIB,
        open_files=4096, open_files_hard=1 << 20, load=0.1, libraries="torch 2", code="abc", driver=GPU.driver,
        clock_offset=0.0, clock_error=0.001,
    )  # fmt: skip


def rank(number: int, *, local_ranks: int = 2) -> RankReport:
    """Return a GPU without faults."""
    return RankReport(
        rank=number, host=f"n{number // local_ranks}", device=f"cuda:{number % local_ranks}", device_name="NVIDIA H200",
        gpu=GPU, matmul=700e12, copy=3.9e12, cpu_received=1.0, read=1e9, decode=2000.0,
    )  # fmt: skip


def healthy(nodes: int = 3, *, local_ranks: int = 2) -> Report:
    """Return the report of a job without faults."""
    hosts = [node(number, local_ranks=local_ranks) for number in range(nodes)]
    pairs = tuple(
        Pair(hosts=(a.host, b.host), latency=20e-6, bandwidth=40e9) for a in hosts for b in hosts if a.host < b.host
    )
    return Report(
        data="imagenet-shards",
        nodes=tuple(hosts),
        ranks=tuple(rank(number, local_ranks=local_ranks) for number in range(nodes * local_ranks)),
        network=NetworkReport(
            latency=60e-6, all_reduce=(AllReduce(bytes=1 << 26, seconds=1e-3, bus_bandwidth=1e11),), pairs=pairs
        ),
        seconds=20.0,
    )


def with_node(report: Report, number: int, **fields: object) -> Report:
    """Return the report with other properties of one host."""
    nodes = list(report.nodes)
    nodes[number] = replace(nodes[number], **fields)  # type: ignore[arg-type]
    return replace(report, nodes=tuple(nodes))


def with_rank(report: Report, number: int, **fields: object) -> Report:
    """Return the report with other measurements of one rank."""
    ranks = list(report.ranks)
    ranks[number] = replace(ranks[number], **fields)  # type: ignore[arg-type]
    return replace(report, ranks=tuple(ranks))


def with_slow_link(report: Report, host: str, *, latency: float = 1.0, bandwidth: float = 1.0) -> Report:
    """Return the report with multiples of the latency and bandwidth of all pairs of a host."""
    assert report.network is not None
    pairs = tuple(
        replace(pair, latency=pair.latency * latency, bandwidth=pair.bandwidth * bandwidth)
        if host in pair.hosts
        else pair
        for pair in report.network.pairs
    )
    return replace(report, network=replace(report.network, pairs=pairs))

"""Measure all ranks of a job at the same time."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch

from launch.doctor.measurements.channel import Channel, open_channel
from launch.doctor.measurements.clock import ClockOffset, measure_clocks
from launch.doctor.measurements.device import DeviceSpeed, measure_device
from launch.doctor.measurements.input import InputFiles, ReadResult, measure_decoding, measure_reading, open_input
from launch.doctor.measurements.network import (
    all_reduce_latency,
    measure_all_reduce,
    measure_pairs,
    reserve_memory,
)
from launch.doctor.measurements.node import describe_node
from launch.doctor.measurements.report import NetworkReport, NodeReport, RankReport, Report
from launch.machine.network import START_TIMEOUT
from launch.machine.provenance import device_name
from launch.machine.world import World
from shards.errors import first_line
from shards.redact import redacted

T = TypeVar("T")


@dataclass(frozen=True)
class Durations:
    """Duration of each measurement in seconds, the largest all-reduce in bytes, and NCCL's timeout."""

    device: float
    read: float
    decode: float
    all_reduce: float
    pairs: float
    largest: int
    nccl_timeout: timedelta


JOIN_TIMEOUT = timedelta(minutes=2)
"""How long to wait for ranks that have not started yet; imports take long on cold file systems."""
COMPLETE = Durations(
    device=1.0, read=3.0, decode=1.0, all_reduce=8.0, pairs=12.0, largest=1 << 26, nccl_timeout=JOIN_TIMEOUT
)
# NCCL cannot be interrupted otherwise than by ending the process, so its timeout is that of the training's start.
BRIEF = Durations(
    device=0.4, read=1.0, decode=0.0, all_reduce=2.0, pairs=5.0, largest=1 << 24, nccl_timeout=START_TIMEOUT
)
"""Before a training: at most about 20 s."""


def measure(
    world: World, data: Path | str | None, *, cores: int, durations: Durations, phase: Callable[[str], object]
) -> Report:
    """Measure this rank, and return the measurements of all ranks. Collective.

    A measurement that fails on one rank is reported by `RankReport.errors`, and does not keep others waiting.

    Args:
        data: folder or URL of a shard set whose files are read; None: none.
        cores: CPU cores that the ranks of this host may use together.
        phase: called with the name of each measurement.

    Raises:
        RuntimeError: the ranks could not communicate.
    """
    started, load = time.monotonic(), os.getloadavg()[0]
    local = LocalMeasurements()
    node = local.attempt("host", lambda: describe_node(world, cores=cores, load=load)) if _is_first(world) else None
    with _without_lasting_memory(world.device), open_channel(world, durations.nccl_timeout) as channel:
        phase("device")
        channel.align()
        speed = local.attempt("device", lambda: _speed(world, durations))
        if speed is not None and speed.error is not None:
            local.errors.append(speed.error)
        _release_memory(world.device)
        read, decode = None, None
        if data is not None:
            phase("input")
            read, decode = _input(local, channel, data, durations)
        reserved = local.attempt("network", lambda: reserve_memory(world.device)) if world.size > 1 else None
        own = RankReport(
            rank=world.rank,
            host=world.host,
            device=str(world.device),
            device_name=device_name(world.device),
            gpu=speed.gpu if speed else None,
            matmul=speed.matmul if speed else None,
            copy=speed.copy if speed else None,
            cpu_received=speed.cpu_received if speed else None,
            throttled=speed.throttled if speed else None,
            read=read.rate if read else None,
            decode=decode,
            errors=tuple(local.errors),
        )
        if world.size > 1:
            phase("network")
        all_reserved = world.size > 1 and channel.largest(0.0 if reserved else 1.0) == 0
        reports = channel.gather((own, node))
        ranks = tuple(rank for rank, _ in reports)
        clocks = measure_clocks(channel)
        nodes = tuple(_complete(node, rank, clocks) for rank, node in reports if node is not None)
        network = _network(channel, nodes, durations) if all_reserved else None
    location = None if data is None else str(redacted(str(data)))
    return Report(data=location, nodes=nodes, ranks=ranks, network=network, seconds=time.monotonic() - started)


@contextlib.contextmanager
def _without_lasting_memory(device: torch.device) -> Iterator[None]:
    """Return the memory that the block has used to the GPU, and reset the peak, which a training reports."""
    try:
        yield
    finally:
        _release_memory(device)


def _release_memory(device: torch.device) -> None:
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # after an error of the GPU, every call raises it again
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)


class LocalMeasurements:
    """Runs measurements that involve no other ranks. One that fails is recorded, because others wait for this rank."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    def attempt(self, what: str, work: Callable[[], T]) -> T | None:
        try:
            return work()
        except Exception as error:
            self.errors.append(f"{what}: {first_line(error) or type(error).__name__}")
            return None


def _is_first(world: World) -> bool:
    return world.local_rank == 0


def _speed(world: World, durations: Durations) -> DeviceSpeed:
    return measure_device(world.device, threads=world.cores, seconds=durations.device)


def _input(
    local: LocalMeasurements, channel: Channel, data: Path | str, durations: Durations
) -> tuple[ReadResult | None, float | None]:
    """Return what was read and the images/s that were decoded. Collective."""
    world, read, decode = channel.world, None, None
    found: InputFiles | None = local.attempt("input", lambda: open_input(data))
    seed = int(channel.largest(secrets.randbelow(2**32)))
    if found is not None:
        files, seconds = found, durations.read
        read = local.attempt(
            "read",
            lambda: measure_reading(files, rank=world.rank, ranks=world.size, seconds=seconds, seed=seed),
        )
    if not durations.decode:
        return read, None
    channel.align()
    if found is not None and read is not None:
        files, beginning, seconds = found, read.beginning, durations.decode
        decode = local.attempt("decode", lambda: measure_decoding(files, beginning, cores=world.cores, seconds=seconds))
    return read, decode


def _complete(node: NodeReport, rank: RankReport, clocks: list[ClockOffset]) -> NodeReport:
    """Add what is known only after the measurements."""
    clock = clocks[node.first_rank]
    driver = rank.gpu.driver if rank.gpu else None
    return replace(node, driver=driver, clock_offset=clock.offset, clock_error=clock.error)


def _network(channel: Channel, nodes: tuple[NodeReport, ...], durations: Durations) -> NetworkReport:
    latency = all_reduce_latency(channel)
    sizes = measure_all_reduce(channel, largest=durations.largest, seconds=durations.all_reduce)
    pairs = []
    if len(nodes) > 1:
        firsts, hosts = [node.first_rank for node in nodes], [node.host for node in nodes]
        pairs = measure_pairs(channel, firsts, hosts, seconds=durations.pairs)
    return NetworkReport(latency=latency, all_reduce=sizes, pairs=tuple(pairs))

"""Files of `pipeline bench` and `pipeline doctor` for tests of `pipeline capacity`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from launch.doctor.json_file import to_json
from launch.doctor.measurements.report import AllReduce, NetworkReport, Report
from launch.doctor.thresholds import Thresholds
from tests.support.doctors import healthy


def bench(*, model: str = "fat_b0", batch: int = 16, seconds: float = 1.0, gpu: bool = False) -> dict[str, Any]:
    """Return the figures of a step of `seconds`, with a loader that is ten times as fast."""
    rate = batch / seconds
    phase = {"rate": rate, "cpu": 0.001, "waiting": 0.0, "host": 0.0, "times": []}
    return {
        "verdict": "ignored",
        "machine": {"device": "GPU" if gpu else "CPU", "cpu": "CPU", "cores": 2},
        "settings": {
            "model": model,
            "batch": batch,
            "size": 224,
            "ranks": 1,
            "loader": "dali on CPUs",
            "compile": "off",
        },
        "loader": phase | {"rate": 10 * rate},
        "model": phase,
        "both": phase,
        "decode_paths": {"window": {"rate": 1000.0, "cpu": 0.001}},
        "memory": {"total": 1} if gpu else {},
    }


def on_cpus(report: Report, *, latency: float = 1e-3, bandwidth: float = 1e8) -> Report:
    """Return the report of ranks on CPUs whose all-reduces take `latency` plus the bytes of a ring / `bandwidth`."""
    ranks = len(report.ranks)
    sent = 2 * (ranks - 1) / ranks
    sizes = tuple(
        AllReduce(bytes=size, seconds=latency + sent * size / bandwidth, bus_bandwidth=bandwidth)
        for size in (1 << 16, 1 << 20, 1 << 24, 1 << 26)
    )
    network = NetworkReport(latency=latency, all_reduce=sizes, pairs=report.network.pairs if report.network else ())
    return replace(
        report,
        network=network,
        ranks=tuple(replace(rank, device="cpu", device_name="CPU", gpu=None) for rank in report.ranks),
    )


def write(path: Path, content: dict[str, Any] | Report) -> Path:
    """Write a file as the command does."""
    if isinstance(content, Report):
        content = to_json(content, [], [], Thresholds())
    path.write_text(json.dumps(content))
    return path


def cpu_doctor(path: Path, *, hosts: int = 2, **network: float) -> Path:
    """Write the file of a doctor on hosts with one rank each."""
    return write(path, on_cpus(healthy(hosts, local_ranks=1), **network))

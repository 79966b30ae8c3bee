"""Compare loaders by running them alternately in one process, so that other load on the machine affects all of them.

Each turn starts a new loader. In addition to the rate, the CPU time per image of this process and its children is
measured: it depends less on other programs on the machine.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from launch.machine.provenance import cpu_name
from shards.cores import cores

Maker = Callable[[], Iterator[int]]
"""Starts a loader that yields the number of units (images, bytes) of each batch."""


@dataclass(frozen=True)
class Turn:
    """Measurements of one loader in one round."""

    rate: float
    """Units per second."""
    cpu: float
    """CPU seconds per unit."""


def run_interleaved(makers: Mapping[str, Maker], *, rounds: int, units: int, warm_up: int) -> dict[str, list[Turn]]:
    """Run every loader once per round, in rotating order. The first `warm_up` units fill its queues and are not timed.

    Returns:
        For each loader, its turns by round.
    """
    turns: dict[str, list[Turn]] = {name: [] for name in makers}
    for number in range(rounds):
        names = list(makers)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            loader = makers[name]()
            _consume(loader, warm_up)
            start, cpu = time.perf_counter(), _cpu_seconds()
            done = _consume(loader, units)
            turns[name].append(Turn(done / (time.perf_counter() - start), (_cpu_seconds() - cpu) / done))
            loader.close()  # type: ignore[attr-defined]
            print(f"  round {number + 1} {name:32s} {turns[name][-1].rate:12,.0f}/s", flush=True)
    return turns


def ratio(turns: dict[str, list[Turn]], one: str, other: str) -> dict[str, float]:
    """Return medians over rounds: how many times faster `one` is, and how many times less CPU time it needs."""
    pairs = list(zip(turns[one], turns[other], strict=True))
    return {
        "rate": statistics.median(a.rate / b.rate for a, b in pairs),
        "cpu": statistics.median(b.cpu / a.cpu for a, b in pairs),
    }


def medians(turns: dict[str, list[Turn]]) -> dict[str, dict[str, float]]:
    return {
        name: {
            "rate": statistics.median(turn.rate for turn in some),
            "cpu": statistics.median(turn.cpu for turn in some),
        }
        for name, some in turns.items()
    }


def machine(device: torch.device) -> dict[str, Any]:
    """Describe the machine."""
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
    return {
        "cpu": cpu_name(),
        "cores": cores(),
        "load": os.getloadavg()[0],
        "gpu": gpu,
        "torch": torch.__version__,
    }


def _consume(loader: Iterator[int], wanted: int) -> int:
    done = 0
    while done < wanted:
        done += next(loader)
    return done


def _cpu_seconds() -> float:
    """Return the CPU seconds of this process and of its running children."""
    pids = [int(pid) for children in Path("/proc/self/task").glob("*/children") for pid in children.read_text().split()]
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # user and system time, proc(5)
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")

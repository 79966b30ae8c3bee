"""Measure what the search for slow ranks (launch/stragglers) adds to a training step of FAT-B0.

The additional work is measured by itself, because it is far smaller than the variation of a step. All figures are CPU
time, which depends less on other programs than wall time.

  step      per step: two contexts around the step and its backward pass, and a hook of autograd; if BatchNorm is
            synchronized, also one context around each of its collectives (35 layers, forward and backward)
  observer  per second: the thread that samples counters of the kernel, in a process with 100 threads
  interval  per log line: reading the figures, and comparing all ranks, by the number of ranks
  train     a step of FAT-B0 on CPUs, for comparison: a small batch, so the fractions are upper limits

On GPUs only events are added; their number per step is counted with simulated events, and the host's time per event is
an assumption (5 us, of which the device spends less than 1 us).

    python benchmarks/slow_ranks.py [--batch 16] [--size 96] [--out FILE.json]
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import tyro

import fat
from benchmarks.interleaved import machine
from launch.stragglers.collective_wait import SAMPLED_STEPS, CollectiveWait, collective
from launch.stragglers.detection import RankInterval, StragglerDetector
from launch.stragglers.gpu_speed import PROBE_SECONDS
from launch.stragglers.local_causes import LocalObserver

CPU = torch.device("cpu")
BATCH_NORM_COLLECTIVES = 70  # of FAT-B0
ZERO1_COLLECTIVES = 4
THREADS = 100
EVENT_SECONDS = 5e-6  # assumed: creating and recording a CUDA event from Python
PROBE_MILLISECONDS = 0.2  # assumed: both multiplications, on an H200
GPU_STEP_SECONDS = 25.7e-3  # of FAT-B0 with 256 images on an H200 (docs/measurements.md)


@dataclass(frozen=True)
class Options:
    batch: int = 16
    """Images per step."""
    size: int = 96
    """Height and width of the images."""
    log_every: int = 50
    """Steps per log line."""
    out: Path | None = None
    """JSON file for the results."""


class _Event:
    """Simulated CUDA event."""

    count = 0

    def __init__(self) -> None:
        _Event.count += 1

    def query(self) -> bool:
        return True

    def elapsed_time(self, end_event: Any, /) -> float:
        return 1.0


def cpu_seconds(work: Callable[[], object], repeats: int, rounds: int = 7) -> float:
    """Return the smallest CPU time of a call over several rounds of many calls."""
    times = []
    for _ in range(rounds):
        start = time.thread_time()
        for _ in range(repeats):
            work()
        times.append((time.thread_time() - start) / repeats)
    return min(times)


def step_seconds(collectives: int) -> float:
    """Return the additional CPU time per step on a CPU with DDP and some collectives of BatchNorm."""
    waits = CollectiveWait(CPU)
    weight = torch.ones((), requires_grad=True)

    def without() -> None:
        (weight * 2).backward()

    def measured() -> None:
        with waits.step():
            for _ in range(collectives):
                with collective(frequent=True):
                    pass
            loss = weight * 2
            with waits.backward(loss):
                loss.backward()

    return cpu_seconds(measured, 200) - cpu_seconds(without, 200)


def observer_seconds() -> float:
    """Return the CPU time per second of the observer's thread."""
    ended = threading.Event()
    threads = [threading.Thread(target=ended.wait, daemon=True) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    observer = LocalObserver()
    time.sleep(1)
    start, cpu = time.monotonic(), time.process_time()
    time.sleep(10)
    used = (time.process_time() - cpu) / (time.monotonic() - start)
    observer.close()
    ended.set()
    return used


def interval_seconds(ranks: int) -> float:
    """Return the CPU time of a log line for the comparison of all ranks."""
    detector = StragglerDetector([f"node-{rank // 8}" for rank in range(ranks)])
    intervals = [RankInterval(seconds=10.0, data=0.1, communication=1.0 + rank % 7 / 10) for rank in range(ranks)]
    return cpu_seconds(lambda: detector.add(intervals), 20)


def train_seconds(options: Options) -> float:
    """Return the duration of a forward and backward pass of FAT-B0: the smallest of several."""
    model = fat.create_model("fat_b0", num_classes=1000).train()
    images = torch.randn(options.batch, 3, options.size, options.size)
    times = []
    for _ in range(8):
        start = time.perf_counter()
        model(images).sum().backward()
        times.append(time.perf_counter() - start)
    return min(times)


def events_per_step(*, incomplete: bool, collectives: int, frequent: int) -> float:
    """Return how many CUDA events a step records on average."""
    waits = CollectiveWait(CPU, incomplete=incomplete, mark=_Event)
    _Event.count = 0
    for _ in range(SAMPLED_STEPS):
        with waits.step():
            for number in range(collectives + frequent):
                with collective(frequent=number >= collectives):
                    pass
    return _Event.count / SAMPLED_STEPS


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    steps = {"by default": step_seconds(0), "with --sync-bn on": step_seconds(BATCH_NORM_COLLECTIVES)}
    observer, train = observer_seconds(), train_seconds(options)
    intervals = {ranks: interval_seconds(ranks) for ranks in (2, 8, 64, 1024)}
    other = observer * train + intervals[8] / options.log_every
    gpu = {
        "DDP, eager, synchronized BatchNorm": events_per_step(
            incomplete=False, collectives=1, frequent=BATCH_NORM_COLLECTIVES
        ),
        "ZeRO 1, CUDA graphs": events_per_step(incomplete=True, collectives=ZERO1_COLLECTIVES, frequent=0),
    }
    probe = PROBE_MILLISECONDS / 1000 / PROBE_SECONDS
    results = {
        "machine": machine(CPU),
        "note": "the machine was used by other programs during the measurement",
        "cpu": {
            "step_us": {name: round(1e6 * seconds, 1) for name, seconds in steps.items()},
            "observer_us_per_second": round(1e6 * observer, 1),
            "interval_us_by_ranks": {ranks: round(1e6 * seconds, 1) for ranks, seconds in intervals.items()},
            "train": {"batch": options.batch, "size": options.size, "step_ms": round(1e3 * train, 2)},
            "added_fraction_of_a_step": {name: round((own + other) / train, 6) for name, own in steps.items()},
        },
        "gpu_computed": {
            name: {
                "events_per_step": events,
                "host_us_per_step": round(1e6 * events * EVENT_SECONDS, 1),
                "host_fraction_of_a_step": round(events * EVENT_SECONDS / GPU_STEP_SECONDS, 6),
            }
            for name, events in gpu.items()
        }
        | {"device_fraction_of_the_probe": probe},
    }
    print(json.dumps(results, indent=1))
    if options.out is not None:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

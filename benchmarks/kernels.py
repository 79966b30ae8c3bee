"""Compare FAT's Triton kernels with PyTorch, as fractions of the bandwidth at which the device copies memory.

    python benchmarks/kernels.py [--variants fat_b0 fat_b3] [--stages 1 2 3 4] [--batch 256] [--size 224]
                                 [--dtype bfloat16] [--rounds 10] [--sweep] [--out FILE.json]

All depthwise convolutions, gates, norms and attentions of the given stages are measured, forward and backward, and the
part of the feed-forward around its BatchNorm. The implementations run alternately, the device's cache is flushed before
each call, and the median of the rounds is reported. `share` is the minimum memory traffic (every feature map that must
be read or written, counted once) divided by the time and by the bandwidth of a copy (which reads and writes its size):
1 means as fast as a copy of as many bytes. Implementations:

  ours           fat.kernels
  channels-last  PyTorch (cuDNN for convolutions) with channels-last feature maps and weights, like FAT without kernels
  contiguous     PyTorch with NCHW feature maps, like the released implementation of FAT
  other form     of weight gradients: the form that fat/kernels/impl/tiles.py does not choose. If it is faster, add
                 (kernel, stride, width of the gradient) to its STRIPS, or remove it. Forward at stride 2: with 8
                 channels per thread instead of tiles.STRIDE_2_LANES

--sweep also tries other launch configurations of the depthwise kernels and prints the fastest. Needs a CUDA device;
with TRITON_INTERPRET=1 the script runs on the CPU, but its times are meaningless.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import fat
from benchmarks.kernel_jobs import DEVICE, OTHER_FORM, Ways, jobs, weight_forms
from fat.kernels.impl import tiles
from launch.machine.device_peaks import random_bytes

FLUSH = 256 << 20  # bytes overwritten before each call: larger than any L2 cache
COPY = 1 << 30  # bytes copied to measure the bandwidth
SLOW = 0.05  # seconds per call; slower calls are measured only three times
CYCLES_PER_SECOND = 2_000_000_000  # upper bound on the clock rate of a multiprocessor, in Hz
MARGIN = 2.0  # safety factor for launch times: a launch can take longer than the one that was measured
LEAST_CYCLES = 4_000_000  # minimum sleep of the device in clock cycles: 2 ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=fat.list_models(), default=["fat_b0", "fat_b3"])
    parser.add_argument("--stages", nargs="+", type=int, choices=(1, 2, 3, 4), default=[1, 2, 3, 4])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--sweep", action="store_true", help="also try other launch configurations")
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    options = parser.parse_args()
    if DEVICE != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("PyTorch finds no CUDA device; set TRITON_INTERPRET=1 to run on the CPU (times are meaningless)")

    clock = Clock(options.rounds)
    bandwidth = copy_bandwidth(clock)
    setting = {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU, interpreted",
        "torch": torch.__version__,
        "copy GB/s": round(bandwidth / 1e9, 1),
        **{name: getattr(options, name) for name in ("batch", "size", "dtype", "rounds")},
    }
    print(", ".join(f"{key} {value}" for key, value in setting.items()))
    ways = ("ours", "channels-last", "contiguous", OTHER_FORM)
    print(f"{'':46} {'MB':>8} " + " ".join(f"{way + ' us':>17} {'share':>6}" for way in ways))
    results: list[dict[str, Any]] = []
    for job in jobs(options):
        seconds = clock.measure(job.ways, max(LEAST_CYCLES, job.head_start))
        row: dict[str, Any] = {"kernel": job.name, "shape": job.shape, "bytes": job.bytes}
        for way, taken in seconds.items():
            row[way] = {"us": round(taken * 1e6, 1), "share": round(job.bytes / taken / bandwidth, 3)}
        if options.sweep and "depthwise" in job.name and job.trains:
            search = sweep_weights if "weight" in job.name else sweep
            row["sweep"] = search(clock, job.ways["ours"])
        results.append(row)
        cells = [row.get(way, {"us": "", "share": ""}) for way in ways]
        label = f"{job.name} {'x'.join(map(str, job.shape[1:]))}"
        print(
            f"{label:46} {job.bytes / 1e6:8.1f} " + " ".join(f"{c['us']:>17} {c['share']:>6}" for c in cells),
            flush=True,
        )
        if "sweep" in row:
            print(f"{'':46} best of sweep: {row['sweep'][0]}")
        if options.out:
            options.out.write_text(json.dumps({**setting, "results": results}, indent=1) + "\n")


def sweep(clock: Clock, call: Callable[[], object]) -> list[dict[str, Any]]:
    """Time the launch configurations of a depthwise kernel; return them, the fastest first."""
    found: list[dict[str, Any]] = []
    for change in other_tiles():

        def chosen(*shape: int, change: dict[str, int] = change) -> tiles.Tile:
            return tiles.Tile(**change)

        with mock.patch.object(tiles, "depthwise", chosen):
            seconds = clock.measure({"ours": call})["ours"]
        found.append({**change, "us": round(seconds * 1e6, 1)})
    return sorted(found, key=lambda entry: entry["us"])


def sweep_weights(clock: Clock, call: Callable[[], object]) -> list[dict[str, Any]]:
    """Time the launch configurations of a weight gradient; return them, the fastest first."""
    found: list[dict[str, Any]] = []
    for form, run in weight_forms(call):
        seconds = clock.measure({"ours": run})["ours"]
        found.append({**asdict(form.walk), "rows": form.rows, "us": round(seconds * 1e6, 1)})
    return sorted(found, key=lambda entry: entry["us"])


def other_tiles() -> Iterator[dict[str, int]]:
    for rows, cols, channels, warps in itertools.product((2, 4, 7, 8), (8, 16, 32), (32, 64), (2, 4, 8)):
        if cols * channels // (32 * warps) in (2, 4, 8, 16):
            yield {"rows": rows, "cols": cols, "channels": channels, "warps": warps}


class Clock:
    """Measures the device time of calls that run alternately.

    Before each call, the device sleeps until the host has launched all kernels, so that launch overhead is not timed.
    """

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self.flush = torch.empty(FLUSH if DEVICE == "cuda" else 1, dtype=torch.uint8, device=DEVICE)

    def measure(self, ways: Ways, least: int = LEAST_CYCLES) -> dict[str, float]:
        """Return the median device seconds of each implementation.

        Args:
            least: minimum device cycles to sleep while the host launches a call.
        """
        cycles = {way: head_start(self._launch_seconds(call), least) for way, call in ways.items()}
        times: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(self.rounds):
            for way, call in ways.items():
                if number < 3 or median(times[way]) < SLOW:
                    times[way].append(self._once(call, cycles[way]))
        return {way: median(taken) for way, taken in times.items()}

    def _launch_seconds(self, call: Callable[[], object]) -> float:
        """Return the host seconds for launching a call, after a first call for compilation and autotuning."""
        call()
        if DEVICE != "cuda":
            return 0.0
        torch.cuda.synchronize()  # empty the launch queue, because launching blocks when it is full
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        torch.cuda.synchronize()
        return seconds

    def _once(self, call: Callable[[], object], cycles: int) -> float:
        self.flush.zero_()
        if DEVICE != "cuda":
            begun = time.perf_counter()
            call()
            return time.perf_counter() - begun
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(cycles)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def head_start(launch_seconds: float, least: int) -> int:
    """Return the cycles for which the device sleeps while the host launches a call."""
    return max(least, int(MARGIN * CYCLES_PER_SECOND * launch_seconds))


def copy_bandwidth(clock: Clock) -> float:
    """Return the bandwidth of a device-to-device copy: bytes read and written per second."""
    source = random_bytes(COPY if DEVICE == "cuda" else 1 << 20, torch.device(DEVICE))
    target = torch.empty_like(source)
    return 2 * source.numel() / clock.measure({"copy": lambda: target.copy_(source)})["copy"]


if __name__ == "__main__":
    main()

"""Break down the device time of a training step by kernel (milliseconds and launches), with the PyTorch profiler.

    python benchmarks/kernel_times.py [--models fat_b0 fat_b3] [--ways channels-last library] [--batch 256] [--size 224]
                                      [--steps 3] [--top 40] [--loader SET] [--out FILE.json]

The steps are those of benchmarks/step.py, run eagerly, so that the profiler reports every kernel by name; the device
time is the same as in a replayed CUDA graph. `busy` is the fraction of the elapsed time in which a kernel ran; in the
rest, the device waited for the host. Meant for a GPU; on a CPU, operators are reported instead of kernels.

With --loader, the kernels of the training loader (decoding, resizing and augmentation, including those of DALI) are
also reported per batch: the device time that the loader takes from every training step. It does not include the time
of the JPEG engines.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.model import DEVICE, free, machine, reason
from benchmarks.step import WAYS, step
from launch.config.data import DataConfig
from launch.config.recipe import Recipe
from launch.feed import Feed
from launch.machine.device_peaks import synchronize
from launch.machine.world import World

WARM_UP = 3  # steps before profiling, in which memory is allocated and kernels are chosen
LOADER_BATCHES = 4  # loader batches to profile per step, because a batch takes less time than a step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["fat_b0", "fat_b3"])
    parser.add_argument(
        "--ways", nargs="+", choices=[way for way in WAYS if "graph" not in way], default=["channels-last", "library"]
    )
    parser.add_argument("--batch", type=int, default=256 if DEVICE == "cuda" else 2)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--top", type=int, default=40, help="number of kernels to print")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16" if DEVICE == "cuda" else "float32"
    )
    parser.add_argument("--loader", metavar="SET", help="first profile the training loader on this shard set")
    parser.add_argument("--augment", default="fat", help="augmentation of the loader")
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    options = parser.parse_args()

    setting = {name: getattr(options, name) for name in ("batch", "size", "steps", "dtype")}
    setting |= {"machine": machine(), "torch": torch.__version__}
    rows = []
    measures = [("loader", options.augment, loader_times)] if options.loader else []
    for model, way, measure in measures + [(m, w, kernel_times) for m in options.models for w in options.ways]:
        try:
            row = measure(model, way, options)
        except Exception as error:
            row = {"model": model, "way": way, "failed": reason(error)}
            print(f"{model} {way}: {row['failed']}", flush=True)
        rows.append(row)
        free()
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps({**setting, "results": rows}, indent=1) + "\n")
    return int(any("failed" in row for row in rows))


def kernel_times(model: str, way: str, options: argparse.Namespace) -> dict[str, Any]:
    """Profile one model in one mode."""
    return profiled(model, way, step(model, way, True, options), options.steps, options)


def loader_times(model: str, augment: Literal["fat", "light", "none"], options: argparse.Namespace) -> dict[str, Any]:
    """Profile the training loader alone. It prefetches batches before the profile starts and as many before it ends, so
    that the average per batch is correct."""
    data = DataConfig(data=options.loader, global_batch=options.batch, size=options.size, augment=augment)
    device = torch.device("cuda", torch.cuda.current_device()) if DEVICE == "cuda" else torch.device("cpu")
    feed = Feed.of(Recipe(data=data), World(0, 1, 0, 1, device))
    with feed.train_loader(step=0, dtype=getattr(torch, options.dtype)) as batches:
        for _ in range(feed.loader_options.settings.ahead):
            next(batches)
        return profiled(model, augment, lambda: next(batches), LOADER_BATCHES * options.steps, options)


def profiled(
    model: str, way: str, once: Callable[[], object], steps: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Profile some calls of `once`; print and return the time per call of each kernel, the longest first."""
    for _ in range(WARM_UP):
        once()
    kind = ProfilerActivity.CUDA if DEVICE == "cuda" else ProfilerActivity.CPU
    with profile(activities=[kind]) as profiler:
        start = time.perf_counter()
        for _ in range(steps):
            once()
        synchronize(torch.device(DEVICE))
        seconds = time.perf_counter() - start
    spent: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for event in profiler.key_averages():
        microseconds = event.self_device_time_total if DEVICE == "cuda" else event.self_cpu_time_total
        if microseconds > 0:
            spent[event.key][0] += microseconds / 1000 / steps
            spent[event.key][1] += event.count / steps
    if not spent and (DEVICE == "cuda" or model != "loader"):  # the CPU profiler does not record the loader's threads
        raise RuntimeError("the profiler recorded no kernels; this machine may not permit CUPTI (profiling counters)")
    kernels: list[dict[str, Any]] = [
        {"kernel": name, "ms": round(ms, 4), "launches": round(count, 1)}
        for name, (ms, count) in sorted(spent.items(), key=lambda item: -item[1][0])
    ]
    total, wall = sum(ms for ms, _ in spent.values()), 1000 * seconds / steps
    unit = "batch" if model == "loader" else "step"
    print(f"\n{model} {way}: {wall:.2f} ms per {unit}, kernels {total:.2f} ms, busy {total / wall:.0%}", flush=True)
    for row in kernels[: options.top]:
        print(f"{row['ms']:9.3f} ms {row['ms'] / total:6.1%} {row['launches']:7.1f} x  {row['kernel'][:110]}")
    return {
        "model": model,
        "way": way,
        "ms": round(wall, 3),
        "kernels ms": round(total, 3),
        "busy": round(total / wall, 3),
        "kernels": kernels,
    }


if __name__ == "__main__":
    sys.exit(main())

"""Where the device's time goes in a training step: milliseconds and launches of each kernel, by torch's profiler.

    python benchmarks/kernel_times.py [--models fat_b0 fat_b3] [--ways channels-last library] [--batch 256] [--size 224]
                                      [--steps 3] [--top 40] [--loader SET] [--out FILE.json]

The steps are those of benchmarks/step.py, run eagerly, so that every kernel has its name: the device's own time is the
same as in a replayed graph. `busy` is the share of the steps' time in which some kernel ran; 1 - busy is what the host
was late for. On CPUs operators take the place of kernels, which rehearses the script.

With --loader, also of a batch of the training loader on a shard set: decoding, resizing and augmentation, DALI's own
kernels among them. That much of the device the loader takes from every training step; the JPEG engines' own time is not
in it.
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

WARM_UP = 3  # steps: allocations, kernels' choice
LOADER_BATCHES = 4  # batches profiled for each step: they are short


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["fat_b0", "fat_b3"])
    parser.add_argument(
        "--ways", nargs="+", choices=[way for way in WAYS if "graph" not in way], default=["channels-last", "library"]
    )
    parser.add_argument("--batch", type=int, default=256 if DEVICE == "cuda" else 2)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--top", type=int, default=40, help="kernels to print")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16" if DEVICE == "cuda" else "float32"
    )
    parser.add_argument("--loader", metavar="SET", help="also profile the training loader on this shard set, first")
    parser.add_argument("--augment", default="fat", help="of the loader")
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
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
    """One model run in one way: kernels by time, most first."""
    return profiled(model, way, step(model, way, True, options), options.steps, options)


def loader_times(model: str, augment: Literal["fat", "light", "none"], options: argparse.Namespace) -> dict[str, Any]:
    """The training loader alone: kernels of a batch by time, most first. It runs ahead, by as much when it ends."""
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
    """What some calls of `once` take, each; the table of it is printed."""
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
    if not spent and (DEVICE == "cuda" or model != "loader"):  # a CPU's profiler does not see the loader's threads
        raise RuntimeError("the profiler saw no kernel: CUPTI may not be permitted on this machine")
    kernels: list[dict[str, Any]] = [
        {"kernel": name, "ms": round(ms, 4), "launches": round(count, 1)}
        for name, (ms, count) in sorted(spent.items(), key=lambda item: -item[1][0])
    ]
    total, wall = sum(ms for ms, _ in spent.values()), 1000 * seconds / steps
    unit = "batch" if model == "loader" else "step"
    print(f"\n{model} {way}: {wall:.2f} ms a {unit}, kernels {total:.2f} ms, busy {total / wall:.0%}", flush=True)
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

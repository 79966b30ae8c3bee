"""Compare training steps of FAT with those of other models (timm), in the same engine on the same device, in images/s.

    python benchmarks/peers.py [--models fat_b0 ... efficientnet_b0 ...] [--ways graph compiled eager] [--batch 256]
                               [--size 224] [--rounds 5] [--steps 4] [--fat-figures FILE.json] [--out FILE.json]

A step is that of `launch.engine.engine.Engine`: forward under bf16 autocast, cross-entropy, backward, gradient clipping
and fused AdamW, with channels-last weights and images and without ZeRO. Every model has 1000 classes and its default
regularization (FAT: drop path; timm's models: none). Modes (--ways):

  graph     eager, with the step captured as a CUDA graph (compile mode `cudagraphs`): seconds per model, needs CUDA
  compiled  the model under torch.compile: a minute or more per model. If a model cannot be compiled as a whole, it runs
            with graph breaks; if it cannot be compiled at all, eagerly. Its row says so
  eager     neither

Each model is built, warmed up, timed (median of the rounds) and freed before the next one. Ratios are relative to the
fastest row of each FAT model, in this run or in --fat-figures (the --out of an earlier run on the same machine). Meant
for a GPU; needs timm. The default batch size on a CPU is 8.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import nn

import fat
from benchmarks.gpu_run.parts import PEERS
from benchmarks.model import DEVICE, free, machine, reason
from benchmarks.step import build
from launch.config.data import DataConfig
from launch.config.engine import CompileConfig, ParallelConfig
from launch.config.recipe import Recipe
from launch.engine.engine import Engine
from launch.engine.input_shapes import InputShape
from launch.machine.device_peaks import synchronize
from launch.machine.provenance import versions
from launch.machine.world import World, connect
from pipeline.batch import Batch
from pipeline.plan import Position

WAYS = ("graph", "compiled", "eager")
CLASSES = 1000
LR = 1e-6
# Warm-up steps choose algorithms, allocate memory and capture the graph, which alone takes several steps.
WARM_UP = 5 if DEVICE == "cuda" else 1
WHOLE, BREAKS, EAGER = "whole", "with graph breaks", "not at all, so eager"

Row = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[*fat.list_models(), *PEERS])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["graph" if DEVICE == "cuda" else "eager"])
    parser.add_argument("--batch", type=int, default=256 if DEVICE == "cuda" else 8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="timed steps per round")
    parser.add_argument("--fat-figures", type=Path, help="file with FAT's results, if it exists")
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    options = parser.parse_args()

    world = connect()
    setting = {name: getattr(options, name) for name in ("batch", "size", "rounds", "steps")}
    setting |= {"machine": machine(), **versions()}
    print(", ".join(f"{key} {value}" for key, value in setting.items()))
    fat_rows = fat_figures(options.fat_figures)
    rows: list[Row] = []
    for name in options.models:
        for way in options.ways:
            rows.append(measure(name, way, world, options))
            add_ratios(rows, fat_rows)
            print(line(rows[-1]), flush=True)
            if options.out:
                options.out.write_text(json.dumps({**setting, "results": rows}, indent=1) + "\n")
    return int(all("failed" in row for row in rows))


def fat_figures(file: Path | None) -> list[Row]:
    """Read FAT's rows from the results file of an earlier run; return an empty list if the file does not exist."""
    if file is None or not file.exists():
        return []
    return [row for row in json.loads(file.read_text(encoding="utf-8"))["results"] if row["model"].startswith("fat_")]


def measure(name: str, way: str, world: World, options: argparse.Namespace) -> Row:
    """Measure a model and return its row; for `compiled`, use the first compilation mode that works."""
    row: Row = {"model": name, "way": way}
    for how in (WHOLE, BREAKS, EAGER) if way == "compiled" else ("",):
        torch._dynamo.reset()
        if world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        failure = ""
        try:
            row |= timed(name, way, how, world, options) | ({"compiled": how} if how else {})
        except Exception as error:
            failure = reason(error)
        free()  # after the except block, in which the exception keeps the model alive
        if not failure:
            return row
        if how in (WHOLE, BREAKS):
            row[f"not {how}"] = failure
    return row | {"failed": failure}


def timed(name: str, way: str, how: str, world: World, options: argparse.Namespace) -> Row:
    """Measure one model."""
    torch.manual_seed(0)
    model = build(name)
    if how in (WHOLE, BREAKS):
        model.compile(fullgraph=how == WHOLE)
    start, number = time.perf_counter(), 0
    engine = engine_of(model, way, world, options)
    batch = random_batch(options.batch, options.size, engine.input_dtype, world.device)

    def step() -> None:
        nonlocal number
        engine.step([batch], step=number, lr=LR)
        number += 1

    for _ in range(WARM_UP):
        step()
    synchronize(world.device)
    warm = time.perf_counter() - start
    seconds = [seconds_of(step, options.steps, world.device) for _ in range(options.rounds)]
    # Reserved, not allocated memory, because PyTorch counts the private pools of CUDA graphs as free between captures.
    memory = torch.cuda.max_memory_reserved() if world.device.type == "cuda" else 0
    return {
        "images/s": round(options.batch * options.steps / median(seconds), 1),
        "engine": engine.description,
        "compiled": engine.resolved["compile"],  # includes the reason if the capture failed
        "warm-up s": round(warm, 1),
        "GB": round(memory / 1e9, 1),
    }


def engine_of(model: nn.Module, way: str, world: World, options: argparse.Namespace) -> Engine:
    """Build the engine as training does on one GPU."""
    mode: Any = "cudagraphs" if way == "graph" else "off"
    recipe = Recipe(
        parallel=ParallelConfig(zero=0),
        compile=CompileConfig(compile=mode),
        data=DataConfig(global_batch=options.batch, size=options.size),
    )
    return Engine(model, recipe, world, shapes=[InputShape(options.batch, options.size, 1)])


def random_batch(rows: int, size: int, dtype: torch.dtype, device: torch.device) -> Batch:
    """Return random images and labels on the device."""
    images = torch.randn(rows, 3, size, size, device=device, dtype=dtype)
    return Batch(
        images=images.contiguous(memory_format=torch.channels_last),
        labels=torch.randint(CLASSES, (rows,), device=device),
        ids=np.arange(rows),
        planned=np.arange(rows),
        mask=torch.ones(rows, dtype=torch.bool, device=device),
        position=Position(0, 0),
    )


def seconds_of(step: Callable[[], None], steps: int, device: torch.device) -> float:
    """Return the seconds of some steps, from an idle device to an idle device."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize(device)
    return time.perf_counter() - start


def add_ratios(rows: list[Row], fat_rows: list[Row]) -> None:
    """Add to each row the ratio of its images/s to the fastest row of every FAT model."""
    best: dict[str, float] = {}
    for row in [*fat_rows, *rows]:
        if row["model"].startswith("fat_") and "images/s" in row:
            best[row["model"]] = max(row["images/s"], best.get(row["model"], 0.0))
    for row in rows:
        if "images/s" in row:
            row |= {f"to {name}": round(row["images/s"] / rate, 3) for name, rate in best.items()}


def line(row: Row) -> str:
    found = row.get("failed") or f"{row['images/s']:>10,.1f} images/s"
    ratios = ", ".join(f"{value:.2f} {key}" for key, value in row.items() if key.startswith("to fat"))
    return f"{row['model']:18} {row['way']:10} {found}  {row.get('compiled', '')}  {ratios}"


if __name__ == "__main__":
    sys.exit(main())

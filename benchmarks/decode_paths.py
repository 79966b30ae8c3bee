"""Measure the host cost of each decode path: images/s and CPU time per image, from stored samples to batches.

    python benchmarks/decode_paths.py [--rounds 5] [--steps 8] [--batch 64] [--count 600] [--data DIR] [--out FILE.json]

Photos of `pipeline sample photos`, random resized crop to 224 pixels, flip and normalization, no further augmentation:

- the paths of `pipeline bench` (launch/bench/decode_paths.py) on the GPU if there is one, else on CPUs
- `decode only, window` and `decode only, whole`: DALI's CPU decoder alone, without reading and resizing; this is what
  the host does for a GPU with `--cpu-decode 1`

The paths run alternately over the same samples; medians are reported. `benchmarks/cores_per_gpu.py` computes from the
result how many CPU cores a GPU needs. Use an otherwise idle machine.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import tyro

from benchmarks.interleaved import Maker, machine, medians, run_interleaved
from launch.bench.decode_paths import DecodePath, decode_paths, repeating, with_loader_options, without_augmentation
from launch.bench.one_rank import EPOCHS
from launch.cli import main as pipeline
from launch.config.data import DataConfig
from launch.config.optim import OptimConfig
from launch.config.recipe import Recipe
from launch.feed import Feed
from launch.jpeg_decoder import choose_jpeg_decoder
from launch.machine.world import World
from pipeline.augment.params import draw
from pipeline.decode.dali_graph import DaliGraph
from pipeline.jobs import open_reader
from pipeline.options import LoaderSettings
from shards.cores import cores

DecodeWhat = Literal["window", "whole"]


@dataclass(frozen=True)
class Options:
    """Measure the host cost of each decode path."""

    rounds: int = 5
    """Number of interleaved rounds."""
    steps: int = 8
    """Batches per path and round."""
    batch: int = 64
    """Images per batch."""
    count: int = 600
    """Number of photos to generate."""
    data: Path | None = None
    """Folder for photos/ and photos-shards/, generated if they do not exist. Default: a temporary folder."""
    out: Path | None = None
    """Write the results to this JSON file."""


def through_loader(feed: Feed, path: DecodePath) -> Iterator[int]:
    """Yield the sizes of the batches of a loader."""
    changed = with_loader_options(feed, {**path.options, "feed_process": "off"})
    with changed.train_loader(step=0, dtype=torch.float32) as loader:
        for batch in loader.stream():
            yield len(batch.images)


def decode_only(feed: Feed, path: DecodeWhat) -> Iterator[int]:
    """Yield the sizes of batches that DALI's CPU decoder decodes from memory."""
    plan, rows = feed.plan, range(feed.shape.micro_rows)
    graph = DaliGraph(on_gpu=False, settings=LoaderSettings(decode=path))
    with open_reader(feed.dataset, "train", feed.loader_options) as reader:
        batches = [reader.read(plan.ids(plan.at(step), rows)).checked() for step in range(plan.steps_per_epoch)]

    kept: deque[tuple[Any, ...]] = deque(maxlen=8)  # DALI does not copy its inputs, and prefetches two batches

    def inputs() -> Iterator[tuple[Any, ...]]:
        for step in itertools.count():
            encoded = batches[step % len(batches)]
            sides = {"heights": encoded.rows["height"], "widths": encoded.rows["width"]}
            windows = draw(feed.augment, seed=0, epoch=step, ids=encoded.ids, **sides).windows
            window = map(np.ascontiguousarray, np.split(windows, 2, axis=1)) if graph.crops else ()
            kept.append((encoded.images, *window))
            yield kept[-1]

    pipe = graph.build(inputs(), batch=len(rows), threads=cores(), ahead=2, device=torch.device("cpu"))
    while True:
        (decoded,) = pipe.run()
        yield len(decoded)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.data or Path(temporary)
        photos, shards = folder / "photos", folder / "photos-shards"
        if not photos.exists():
            assert pipeline(["sample", "photos", str(photos), "--count", str(options.count)]) == 0
        if not shards.exists():
            assert pipeline(["shard", str(photos), "--out", str(shards)]) == 0
        data = DataConfig(data=str(shards), global_batch=options.batch, size=224, augment="light")
        recipe = Recipe(data=data, optim=OptimConfig(epochs=EPOCHS, warmup_epochs=0))
        feed, _ = choose_jpeg_decoder(Feed.of(recipe, World(0, 1, 0, 1, device, cores=cores())), previous=None)
        feed = repeating(without_augmentation(feed), options.steps)
        makers: dict[str, Maker] = {
            path.name: partial(through_loader, feed, path) for path in decode_paths(feed, options.steps)
        }
        on_cpu = replace(feed, world=replace(feed.world, device=torch.device("cpu")))
        makers |= {f"decode only, {what}": partial(decode_only, on_cpu, what) for what in get_args(DecodeWhat)}
        units = options.steps * options.batch
        ahead = feed.loader_options.settings.ahead * options.batch
        turns = run_interleaved(makers, rounds=options.rounds, units=units, warm_up=units + ahead)
    settings = {"batch": options.batch, "size": 224, "rounds": options.rounds, "images": units}
    result = {"machine": machine(device), "settings": settings, "medians": medians(turns)}
    for name, figures in result["medians"].items():
        print(f"{name:24s} {figures['rate']:9,.0f} images/s  {figures['cpu'] * 1e3:6.2f} ms of CPU per image")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Measure the sample reader without decoding, in bytes/s, and the effect of slow storage on the loader.

Three methods read the same samples in the same order from the page cache:

- ours: `SampleReader` in the order of the plan (fully random), in threads, with the hash of every sample verified
- read(2): one thread that only reads the samples into one buffer
- memory copy: one thread that copies the samples from memory-mapped shards

Then the complete loader (DALI, recipe `light`) is measured in images/s, with and without an additional latency of 20 ms
per read, as on a slow network file system. Needs no GPU; use an otherwise idle machine.

    python benchmarks/reader.py [--rounds 7] [--count 2000] [--data DIR] [--out FILE.json]
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import tyro
from numpy.typing import NDArray

from benchmarks.interleaved import machine, medians, ratio, run_interleaved
from launch.cli import main as pipeline
from pipeline import jobs
from pipeline.augment.recipe import augment_recipe
from pipeline.batch_shape import BatchShape
from pipeline.loader import TrainLoader
from pipeline.plan import TrainPlan
from pipeline.storage.files import LocalFiles
from pipeline.storage.placement import Storage, open_storage
from pipeline.storage.reader import SampleReader
from shards.format.dataset import ShardSet

BATCH = 64
LATENCY = 0.02  # additional seconds per read
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Options:
    """Measure the throughput of the sample reader."""

    rounds: int = 7
    """Number of interleaved rounds."""
    count: int = 2000
    """Number of photos to generate."""
    data: Path | None = None
    """Folder for photos/ and photos-shards/, generated if they do not exist. Default: a temporary folder."""
    out: Path | None = None
    """Write the results to this JSON file."""


def batches(dataset: ShardSet) -> Iterator[tuple[NDArray[np.int64], int]]:
    plan = TrainPlan(dataset.shard_samples("train"), global_batch=BATCH, seed=0)
    step = 0
    while True:
        yield plan.ids(plan.at(step)), step
        step += 1


def ours(dataset: ShardSet) -> Iterator[int]:
    with SampleReader(open_storage(dataset, "train")) as reader:
        for encoded, _ in reader.read_ahead(batches(dataset), ahead=4):
            yield sum(map(len, encoded.checked().images))


def locations(dataset: ShardSet) -> Iterator[list[tuple[int, int, int]]]:
    """Yield shard, offset and size of the samples of each batch."""
    index = dataset.index("train")
    for ids, _ in batches(dataset):
        rows = index[ids]
        yield list(zip(*(rows[name].tolist() for name in ("shard", "offset", "size")), strict=True))


def system_reads(dataset: ShardSet) -> Iterator[int]:
    shards = range(len(dataset.split("train").shards))
    handles = [os.open(dataset.shard_path("train", shard), os.O_RDONLY) for shard in shards]
    buffer = memoryview(np.empty(BATCH << 20, np.uint8).data)
    try:
        for batch in locations(dataset):
            at = 0
            for shard, offset, size in batch:
                at += os.preadv(handles[shard], [buffer[at : at + size]], offset)
            yield at
    finally:
        for handle in handles:
            os.close(handle)


def memory_copies(dataset: ShardSet) -> Iterator[int]:
    shards = range(len(dataset.split("train").shards))
    maps = [np.memmap(dataset.shard_path("train", shard), np.uint8, mode="r") for shard in shards]
    buffer = np.empty(BATCH << 20, np.uint8)
    for batch in locations(dataset):
        at = 0
        for shard, offset, size in batch:
            buffer[at : at + size] = maps[shard][offset : offset + size]
            at += size
        yield at


class SlowFiles(LocalFiles):
    """Files on a simulated slow file system, where every read takes `LATENCY` longer."""

    def read(self, file: int, target: NDArray[np.uint8], offset: int) -> None:
        time.sleep(LATENCY)
        super().read(file, target, offset)

    def read_if_cached(self, file: int, target: NDArray[np.uint8], offset: int) -> bool:
        return False  # network file systems do not support RWF_NOWAIT


def slow_storage(dataset: ShardSet, split: str, **options: Any) -> Storage:
    paths = [dataset.path / shard.name for shard in dataset.split(split).shards]
    return dataclasses.replace(open_storage(dataset, split, **options), files=SlowFiles(paths))


def loader(dataset: ShardSet, *, slow: bool) -> Iterator[int]:
    plan = TrainPlan(dataset.shard_samples("train"), global_batch=BATCH, seed=0)
    jobs.open_storage = slow_storage if slow else open_storage
    with TrainLoader(
        dataset, plan, BatchShape(global_batch=BATCH), augment_recipe("light"), epochs=1000, device=CPU
    ) as images:
        for batch in images:
            yield len(batch.images)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.data or Path(temporary)
        photos, shards = folder / "photos", folder / "photos-shards"
        if not shards.exists():
            assert pipeline(["sample", "photos", str(photos), "--count", str(options.count)]) == 0
            assert pipeline(["shard", str(photos), "--out", str(shards), "--shard-size", "32"]) == 0
        dataset = ShardSet(shards)
        size = sum(shard.bytes for shard in dataset.split("train").shards)
        names = ("ours", "read(2)", "memory copy")
        makers = dict(zip(names, (partial(f, dataset) for f in (ours, system_reads, memory_copies)), strict=True))
        reading = run_interleaved(makers, rounds=options.rounds, units=5 * size, warm_up=size)
        latency = run_interleaved(
            {
                "without latency": partial(loader, dataset, slow=False),
                "20 ms a read": partial(loader, dataset, slow=True),
            },
            rounds=options.rounds,
            units=768,
            warm_up=512,
        )
    result = {
        "machine": machine(CPU),
        "bytes per second": medians(reading),
        "images per second": medians(latency),
        "ratios": {
            "ours / read(2)": ratio(reading, "ours", "read(2)"),
            "ours / memory copy": ratio(reading, "ours", "memory copy"),
            "20 ms a read / without latency": ratio(latency, "20 ms a read", "without latency"),
        },
    }
    print(f"\n{result['machine']['cpu']}, {result['machine']['cores']} cores, load {result['machine']['load']:.1f}")
    for name, figures in medians(reading).items():
        print(f"{name:16s} {figures['rate'] / 1e9:6.2f} GB/s  {figures['cpu'] * 1e9:6.3f} s of CPU per GB")
    for name, figures in medians(latency).items():
        print(f"{name:16s} {figures['rate']:6.0f} images/s")
    for name, figures in result["ratios"].items():
        print(f"{name:32s} {figures['rate']:5.2f} by rate, {figures['cpu']:5.2f} by CPU time (median of ratios)")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Compare the ways to an image on a CPU: decode its JPEG, read stored pixels, find it in the memory cache.

All do a random resized crop to 224 pixels, horizontal flip and normalization to float32, in batches of 64 in random
order, on photos of `pipeline sample photos` (about 500 x 375 pixels), with as many threads as there are cores:

- JPEG: decode the crop window with DALI on the CPU
- pixels, pixels 256: read from a .beton; 256: shrunk to this short side when the set was made
- cached, cached 256: all images in the memory cache, filled before the measurement; 256: shrunk when they were cached

    python benchmarks/pixels.py [--rounds 5] [--images 2048] [--count 600] [--data DIR] [--out FILE.json]
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import tyro

from benchmarks.interleaved import Maker, machine, medians, ratio, run_interleaved
from benchmarks.loaders.work import BATCH, MANY_EPOCHS, SIZE, WARM_UP
from launch.cli import main as pipeline
from pipeline.augment.recipe import augment_recipe
from pipeline.batch_shape import BatchShape
from pipeline.loader import LoaderOptions, TrainLoader
from pipeline.plan import TrainPlan
from shards.format.dataset import ShardSet

SHORT_SIDE = 256
CACHE_GIB = 8.0
SETS = {
    "jpeg": (),
    "pixels": ("--format", "ffcv", "--write-mode", "raw"),
    "pixels-256": ("--format", "ffcv", "--write-mode", "raw", "--short-side", str(SHORT_SIDE)),
}


@dataclass(frozen=True)
class Options:
    """Compare JPEGs, stored pixels and the memory cache."""

    rounds: int = 5
    """Number of interleaved rounds."""
    images: int = 2048
    """Images per loader and round."""
    count: int = 600
    """Number of photos to generate."""
    data: Path | None = None
    """Folder for the photos and the sets, generated if they do not exist. Default: a temporary folder."""
    out: Path | None = None
    """Write the results to this JSON file."""


def load(path: Path, options: LoaderOptions) -> Iterator[int]:
    dataset, augment = ShardSet(path), augment_recipe("light", size=SIZE)
    plan = TrainPlan(dataset.shard_samples("train"), global_batch=BATCH, seed=0)
    shape = BatchShape(global_batch=BATCH)
    with TrainLoader(dataset, plan, shape, augment, epochs=MANY_EPOCHS, device="cpu", options=options) as batches:
        if options.memory_cache:
            for _ in range(2):  # the images that an epoch omits are in the next one, or nearly all of them
                for _ in batches:
                    pass
        for batch in batches.stream():
            yield len(batch.images)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    cached = LoaderOptions(memory_cache=CACHE_GIB)
    shrunk = LoaderOptions(memory_cache=CACHE_GIB, memory_cache_short_side=SHORT_SIDE)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.data or Path(temporary)
        photos = folder / "photos"
        if not photos.exists():
            assert pipeline(["sample", "photos", str(photos), "--count", str(options.count)]) == 0
        for name, form in SETS.items():
            if not (folder / name).exists():
                assert pipeline(["shard", str(photos), "--out", str(folder / name), "--shard-size", "32", *form]) == 0
        makers: dict[str, Maker] = {
            "JPEG": partial(load, folder / "jpeg", LoaderOptions()),
            "pixels": partial(load, folder / "pixels", LoaderOptions()),
            "pixels 256": partial(load, folder / "pixels-256", LoaderOptions()),
            "cached": partial(load, folder / "jpeg", cached),
            "cached 256": partial(load, folder / "jpeg", shrunk),
        }
        turns = run_interleaved(makers, rounds=options.rounds, units=options.images, warm_up=WARM_UP)
    result = {
        "machine": machine(torch.device("cpu")),
        "settings": {"batch": BATCH, "size": SIZE, "rounds": options.rounds, "images": options.images},
        "medians": medians(turns),
        "ratios": {f"{name} / JPEG": ratio(turns, name, "JPEG") for name in makers if name != "JPEG"},
    }
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

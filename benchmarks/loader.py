"""Images per second of loaders that do the same work, in one run: ours, DALI's own webdataset reader, a PIL DataLoader.

All three: random resized crop to 224 (bicubic, antialiased), horizontal flip, normalise to float32, batches of 64 in
random order, on `pipeline sample photos` data, as many threads or workers as there are cores. Ours reads through the
plan in full random order and checks every sample's hash; DALI's reader shuffles in a buffer of 1024; the DataLoader
opens the JPEG files themselves. After a warm-up each, the three take turns and medians of `--rounds` are reported.

    python benchmarks/loader.py [--rounds 7] [--images 1024] [--count 2000] [--out FILE.json]
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import tyro
from nvidia.dali import fn, pipeline_def, types
from PIL import Image

from pipeline.augment.params import crop_windows, flips
from pipeline.augment.recipe import augment_recipe
from pipeline.cli import main as pipeline
from pipeline.decode import decode_threads
from pipeline.loader import LoaderOptions, TrainLoader
from pipeline.plan import BatchShape, TrainPlan
from shards.dataset import ShardSet

BATCH, SIZE = 64, 224
RECIPE = augment_recipe("light", size=SIZE)
MANY_EPOCHS = 1000


@dataclass(frozen=True)
class Options:
    """Compare loaders."""

    rounds: int = 7
    """Interleaved rounds."""
    images: int = 1024
    """Images per loader and round."""
    count: int = 2000
    """Photos to make, when `--data` is not given."""
    data: Path | None = None
    """Folder with photos/ and photos-shards/ from an earlier run."""
    out: Path | None = None
    """JSON file for the figures."""


def ours(dataset: ShardSet, device: torch.device) -> Iterator[int]:
    plan = TrainPlan(dataset.shard_samples("train"), global_batch=BATCH, seed=0)
    shape = BatchShape(global_batch=BATCH)
    with TrainLoader(
        dataset, plan, shape, RECIPE, epochs=MANY_EPOCHS, device=device, options=LoaderOptions()
    ) as loader:
        for batch in loader:
            yield len(batch.images)


@pipeline_def
def dali_pipeline(tars: list[str], indexes: list[str], device: str) -> Any:
    encoded, _ = fn.readers.webdataset(
        paths=tars, index_paths=indexes, ext=["jpg", "cls"], random_shuffle=True, initial_fill=1024, dont_use_mmap=True
    )
    images = fn.decoders.image_random_crop(
        encoded,
        device=device,
        output_type=types.RGB,
        random_area=list(RECIPE.scale),
        random_aspect_ratio=list(RECIPE.ratio),
    )
    images = fn.resize(images, size=[SIZE, SIZE], interp_type=types.INTERP_CUBIC, antialias=True)
    return fn.crop_mirror_normalize(
        images,
        dtype=types.FLOAT,
        output_layout="HWC",
        mean=[255 * m for m in RECIPE.mean],
        std=[255 * s for s in RECIPE.std],
        mirror=fn.random.coin_flip(),
    )


def dali(dataset: ShardSet, device: torch.device) -> Iterator[int]:
    tars = [str(dataset.shard_path("train", i)) for i in range(len(dataset.split("train").shards))]
    gpu = device.type == "cuda"
    pipe = dali_pipeline(
        tars,
        [tar.removesuffix(".tar") + ".idx" for tar in tars],
        "mixed" if gpu else "cpu",
        batch_size=BATCH,
        num_threads=decode_threads(),
        device_id=0 if gpu else None,
    )
    while True:
        (images,) = pipe.run()
        tensor = torch.from_dlpack(images.as_tensor()).clone()
        yield len(tensor)


class PilPhotos(torch.utils.data.Dataset[torch.Tensor]):
    """What a plain PyTorch script does, with the same windows."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted((folder / "train").glob("*/*.JPEG"))
        self.mean = np.array(RECIPE.mean, np.float32) * 255
        self.std = np.array(RECIPE.std, np.float32) * 255

    def __len__(self) -> int:
        return len(self.paths) * MANY_EPOCHS

    def __getitem__(self, item: int) -> torch.Tensor:
        epoch, number = divmod(item, len(self.paths))
        ids = np.array([number])
        image = Image.open(self.paths[number])
        sizes = {"heights": np.array([image.height]), "widths": np.array([image.width])}
        y, x, height, width = crop_windows(RECIPE, seed=0, epoch=epoch, ids=ids, **sizes)[0].tolist()
        image = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC, (x, y, x + width, y + height))
        if flips(RECIPE, seed=0, epoch=epoch, ids=ids)[0]:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = (np.asarray(image, np.float32) - self.mean) / self.std
        return torch.from_numpy(pixels).permute(2, 0, 1)


def pil(folder: Path) -> Iterator[int]:
    loader = torch.utils.data.DataLoader(
        PilPhotos(folder), batch_size=BATCH, shuffle=False, num_workers=decode_threads(), prefetch_factor=4
    )
    for batch in loader:
        yield len(batch)


def rate(images: Iterator[int], wanted: int) -> float:
    """Images per second over the next `wanted` images of a running loader."""
    start, done = time.perf_counter(), 0
    while done < wanted:
        done += next(images)
    return done / (time.perf_counter() - start)


def measure(makers: dict[str, Callable[[], Iterator[int]]], rounds: int, images: int) -> dict[str, list[float]]:
    """Rates per loader and round. Each round starts every loader afresh and warms it up, so that none runs ahead while
    another is on."""
    rates: dict[str, list[float]] = {name: [] for name in makers}
    for number in range(rounds):
        for name in list(makers)[number % len(makers) :] + list(makers)[: number % len(makers)]:
            loader = makers[name]()
            rate(loader, 8 * BATCH)  # fill the queues that run ahead
            rates[name].append(rate(loader, images))
            loader.close()  # type: ignore[attr-defined]
            print(f"  round {number + 1} {name:20s} {rates[name][-1]:7.0f} img/s", flush=True)
    return rates


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.data or Path(temporary)
        photos, shards = folder / "photos", folder / "photos-shards"
        if not shards.exists():
            assert pipeline(["sample", "photos", str(photos), "--count", str(options.count)]) == 0
            assert pipeline(["shard", str(photos), "--out", str(shards), "--shard-size", "32"]) == 0
        dataset = ShardSet(shards)
        makers: dict[str, Callable[[], Iterator[int]]] = {
            "ours": lambda: ours(dataset, device),
            "DALI webdataset": lambda: dali(dataset, device),
            "PIL DataLoader": lambda: pil(photos),
        }
        rates = measure(makers, options.rounds, options.images)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ratios = {
        f"ours / {name}": statistics.median(a / b for a, b in zip(rates["ours"], values, strict=True))
        for name, values in rates.items()
        if name != "ours"
    }
    print(f"\n{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores, {device.type}")
    for name, value in medians.items():
        print(f"{name:20s} {value:7.0f} img/s (median of {options.rounds})")
    for name, value in ratios.items():
        print(f"{name:28s} {value:5.2f} (median of pairs)")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        result = {"machine": machine(device), "medians": medians, "ratios": ratios, "rates": rates}
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "gpu": gpu, "torch": torch.__version__}


if __name__ == "__main__":
    main()

"""Compare this project's loaders with those of DALI and FFCV and with a PyTorch DataLoader, in images/s.

All of them do a random resized crop to 224 pixels, horizontal flip and normalization to float32, in batches of 64 in
random order, on photos of `pipeline sample photos`, with as many threads or workers as there are cores:

- ours, DALI / ours, FFCV: in the order of the plan (fully random), with the hash of every sample verified
- DALI's own: DALI's webdataset reader with a shuffle buffer of 1024 and the same operators (bicubic, antialiased);
  the output is used without a copy
- FFCV's own: FFCV's Loader on the same .beton, RANDOM order, page cache
- PIL: a DataLoader over the JPEG files, with the same crop windows as ours
- ours, DALI, fat: with the paper's augmentation; the additional time is the cost of augmentation

Runs on any machine, with the decoders on the GPU if there is one; use an otherwise idle machine.

    python benchmarks/loader.py [--rounds 7] [--images 1024] [--count 2000] [--data DIR] [--out FILE.json]
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import tyro
from nvidia.dali import fn, pipeline_def, types
from PIL import Image

from benchmarks.interleaved import Maker, machine, medians, ratio, run_interleaved
from launch.cli import main as pipeline
from pipeline.augment.params import crop_windows, flips
from pipeline.augment.recipe import augment_recipe
from pipeline.batch_shape import BatchShape
from pipeline.loader import LoaderOptions, TrainLoader
from pipeline.options import LoaderName
from pipeline.plan import TrainPlan
from shards.cores import cores
from shards.format.dataset import ShardSet

BATCH, SIZE = 64, 224
RECIPE = augment_recipe("light", size=SIZE)
MANY_EPOCHS = 1000


@dataclass(frozen=True)
class Options:
    """Compare loaders."""

    rounds: int = 7
    """Number of interleaved rounds."""
    images: int = 1024
    """Images per loader and round."""
    count: int = 2000
    """Number of photos to generate."""
    data: Path | None = None
    """Folder for photos/ and photos-shards/, generated if they do not exist. Default: a temporary folder."""
    out: Path | None = None
    """Write the results to this JSON file."""


def ours(dataset: ShardSet, device: torch.device, loader: LoaderName, recipe: str = "light") -> Iterator[int]:
    augment = augment_recipe(recipe, size=SIZE)
    plan = TrainPlan(dataset.shard_samples("train"), global_batch=BATCH, seed=0, pairs=augment.mixes)
    shape = BatchShape(global_batch=BATCH, pairs=augment.mixes)
    options = LoaderOptions(loader=loader)
    with TrainLoader(dataset, plan, shape, augment, epochs=MANY_EPOCHS, device=device, options=options) as batches:
        for batch in batches.stream():
            yield len(batch.images)


@pipeline_def
def dali_pipeline(tars: list[str], indexes: list[str], device: str) -> Any:
    encoded, _ = fn.readers.webdataset(  # type: ignore[misc]
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
        num_threads=cores(),
        device_id=0 if gpu else None,
    )
    while True:
        (images,) = pipe.run()
        yield len(torch.from_dlpack(images.as_tensor()))


def ffcv(dataset: ShardSet, device: torch.device) -> Iterator[int]:
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, ToDevice, ToTensor, ToTorchImage

    mean, std = (np.array(values) * 255 for values in (RECIPE.mean, RECIPE.std))
    on_gpu = [ToDevice(device, non_blocking=True)] if device.type == "cuda" else []
    beton = dataset.split("train").beton
    assert beton is not None
    loader = Loader(
        str(dataset.path / beton.name),
        batch_size=BATCH,
        num_workers=cores(),
        order=OrderOption.RANDOM,
        os_cache=True,
        drop_last=True,
        pipelines={
            "image": [
                RandomResizedCropRGBImageDecoder((SIZE, SIZE), RECIPE.scale, RECIPE.ratio),
                RandomHorizontalFlip(),
                NormalizeImage(mean, std, np.float32),
                ToTensor(),
                *on_gpu,
                ToTorchImage(),
            ],
            "label": [IntDecoder(), ToTensor()],
        },
    )
    while True:
        for images, _ in loader:
            yield len(images)


class PilPhotos(torch.utils.data.Dataset[torch.Tensor]):
    """A data set as in a plain PyTorch script, with the same crop windows as ours."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted((folder / "train").glob("*/*.JPEG"))
        self.mean = np.array(RECIPE.mean, np.float32) * 255
        self.std = np.array(RECIPE.std, np.float32) * 255

    def __len__(self) -> int:
        return len(self.paths) * MANY_EPOCHS

    def __getitem__(self, item: int) -> torch.Tensor:
        epoch, number = divmod(item, len(self.paths))
        ids = np.array([number])
        image: Image.Image = Image.open(self.paths[number])
        sizes = {"heights": np.array([image.height]), "widths": np.array([image.width])}
        y, x, height, width = crop_windows(RECIPE, seed=0, epoch=epoch, ids=ids, **sizes)[0].tolist()
        image = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC, (x, y, x + width, y + height))
        if flips(RECIPE, seed=0, epoch=epoch, ids=ids)[0]:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = (np.asarray(image, np.float32) - self.mean) / self.std
        return torch.from_numpy(pixels).permute(2, 0, 1)


def pil(folder: Path) -> Iterator[int]:
    loader = torch.utils.data.DataLoader(
        PilPhotos(folder), batch_size=BATCH, shuffle=False, num_workers=cores(), prefetch_factor=4
    )
    for batch in loader:
        yield len(batch)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    has_ffcv = importlib.util.find_spec("ffcv") is not None
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.data or Path(temporary)
        photos, shards = folder / "photos", folder / "photos-shards"
        if not shards.exists():
            beton = ["--format", "both"] if has_ffcv else []
            assert pipeline(["sample", "photos", str(photos), "--count", str(options.count)]) == 0
            assert pipeline(["shard", str(photos), "--out", str(shards), "--shard-size", "32", *beton]) == 0
        dataset = ShardSet(shards)
        makers: dict[str, Maker] = {
            "ours, DALI": partial(ours, dataset, device, "dali"),
            "DALI's own": partial(dali, dataset, device),
            "ours, DALI, fat": partial(ours, dataset, device, "dali", "fat"),
            "PIL DataLoader": partial(pil, photos),
        }
        pairs = [("ours, DALI", "DALI's own"), ("ours, DALI", "PIL DataLoader")]
        if has_ffcv:
            makers |= {
                "ours, FFCV": partial(ours, dataset, device, "ffcv"),
                "FFCV's own": partial(ffcv, dataset, device),
            }
            pairs += [("ours, FFCV", "FFCV's own"), ("ours, FFCV", "PIL DataLoader")]
        turns = run_interleaved(makers, rounds=options.rounds, units=options.images, warm_up=8 * BATCH)
    result = {
        "machine": machine(device),
        "settings": {"batch": BATCH, "size": SIZE, "rounds": options.rounds, "images": options.images},
        "medians": medians(turns),
        "ratios": {f"{one} / {other}": ratio(turns, one, other) for one, other in pairs},
    }
    found = result["medians"]
    result["fat_beyond_decoding_us"] = 1e6 * (found["ours, DALI, fat"]["cpu"] - found["ours, DALI"]["cpu"])
    show(result)
    if not has_ffcv:
        print("FFCV is not installed: skipped 'ours, FFCV' and 'FFCV's own'")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def show(result: dict[str, Any]) -> None:
    print(f"\n{result['machine']['cpu']}, {result['machine']['cores']} cores, load {result['machine']['load']:.1f}")
    for name, figures in result["medians"].items():
        print(f"{name:20s} {figures['rate']:7.0f} images/s  {figures['cpu'] * 1e6:6.0f} us of CPU per image")
    for name, figures in result["ratios"].items():
        print(f"{name:32s} {figures['rate']:5.2f} by rate, {figures['cpu']:5.2f} by CPU time (median of ratios)")
    print(f"augmentation of the recipe fat: {result['fat_beyond_decoding_us']:.0f} us of CPU per image")


if __name__ == "__main__":
    main()

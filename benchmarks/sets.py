"""Compare sets made for speed with the set of the original JPEGs: bytes, host cost and pixel differences.

The sets are converted from photos of `pipeline sample photos`, which have ImageNet's distribution of sizes:

- bytes: stored bytes per image
- decode: CPU time for decoding the whole image from memory with libjpeg-turbo
- loader: CPU time of the whole training loader: read, verify the hash, decode, random resized crop to 224 pixels, flip
  and normalize to float32; with the decoder that `--loader auto` chooses. The loaders run alternately
- difference: mean absolute difference of the model's input (224 pixels, 0 to 255) from that of the original JPEG,
  resized by Pillow's bicubic filter. In training, crop windows are drawn from the stored sizes, as a loader does;
  "scaled window" cuts out exactly the window of the original image, without rounding it to stored pixels
- same windows: fraction of the training windows that are those of the original image, within two stored pixels

A second table compares filters and encodings of shrunk images. Needs no GPU.

    python benchmarks/sets.py [--rounds 3] [--images 1024] [--count 500] [--out FILE.json]
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import simplejpeg
import torch
import tyro
from numpy.typing import NDArray
from PIL import Image

from benchmarks.interleaved import machine, medians, run_interleaved
from benchmarks.loaders.ours import ours
from benchmarks.loaders.work import Photos
from launch.cli import main as pipeline
from pipeline.augment.params import crop_windows
from pipeline.augment.recipe import augment_recipe
from pipeline.jobs import eval_windows
from pipeline.storage.placement import open_storage
from pipeline.storage.reader import SampleReader
from shards.format.dataset import ShardSet
from shards.images.rules import ImageRules
from shards.images.shrink import target_size

SIZE, SHORT_SIDE, QUALITY = 224, 256, 90
RECIPE = augment_recipe("light", size=SIZE)
SETS = {
    "original JPEGs": [],
    f"--short-side {SHORT_SIDE} --quality {QUALITY}": ["--short-side", f"{SHORT_SIDE}", "--quality", f"{QUALITY}"],
    "--pixels": ["--pixels"],
    f"--pixels --short-side {SHORT_SIDE}": ["--pixels", "--short-side", f"{SHORT_SIDE}"],
}
FILTERS = ("BOX", "BILINEAR", "HAMMING", "BICUBIC", "LANCZOS")
ENCODINGS = ("pixels", "4:2:0", "4:4:4")
SAME_WINDOW = 2  # stored pixels

Pixels = NDArray[np.uint8]
Box = NDArray[np.float64]
"""y, x, height and width of a region of an image, in pixels."""


@dataclass(frozen=True)
class Options:
    """Compare sets made for speed."""

    rounds: int = 3
    """Number of interleaved rounds of the loaders."""
    images: int = 1024
    """Images per loader and round."""
    count: int = 500
    """Number of photos to generate."""
    out: Path | None = None
    """Write the results to this JSON file."""


@dataclass(frozen=True)
class Decoded:
    """The training images of a set, decoded."""

    images: list[Pixels]
    """uint8 [height, width, 3] each, RGB."""
    bytes: float
    """Mean stored bytes."""
    milliseconds: float
    """Mean CPU time for decoding an image."""


def decode_set(path: Path) -> Decoded:
    dataset = ShardSet(path)
    with SampleReader(open_storage(dataset, "train")) as reader:
        encoded = reader.read(np.arange(dataset.split("train").samples)).checked()
    start = time.process_time()
    images = [
        image.reshape(row["height"], row["width"], 3) if raw else simplejpeg.decode_jpeg(image, "RGB")
        for image, row, raw in zip(encoded.images, encoded.rows, encoded.raw, strict=True)
    ]
    milliseconds = (time.process_time() - start) / len(images) * 1e3
    return Decoded(images, float(encoded.rows["size"].mean()), milliseconds if not encoded.raw.all() else 0.0)


def model_input(image: Pixels, box: Box) -> NDArray[np.int16]:
    """Resize a region of an image to the model's input."""
    y, x, height, width = box.tolist()
    corners = (x, y, min(x + width, image.shape[1]), min(y + height, image.shape[0]))
    resized = Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BICUBIC, corners)
    return np.asarray(resized).astype(np.int16)


def training_boxes(images: list[Pixels]) -> Box:
    """Return the crop windows of epoch 0, float64 [n, 4]."""
    heights, widths = (np.array([image.shape[axis] for image in images]) for axis in (0, 1))
    ids = np.arange(len(images))
    return crop_windows(RECIPE, seed=0, epoch=0, ids=ids, heights=heights, widths=widths).astype(np.float64)


def evaluation_boxes(images: list[Pixels]) -> Box:
    """Return the center crops, float64 [n, 4]."""
    heights, widths = (np.array([image.shape[axis] for image in images], np.int32) for axis in (0, 1))
    windows, regions = eval_windows(heights, widths, SIZE)
    return np.hstack([windows[:, :2] + regions[:, :2], regions[:, 2:]])


def scales(images: list[Pixels], originals: list[Pixels]) -> Box:
    """Return the factors from original to stored pixels of y, x, height and width, float64 [n, 4]."""
    pairs = zip(images, originals, strict=True)
    return np.array([[a / b for a, b in zip(i.shape[:2], o.shape[:2], strict=True)] * 2 for i, o in pairs])


def difference(images: list[Pixels], boxes: Box, expected: Iterable[NDArray[np.int16]]) -> float:
    cases = zip(images, boxes, expected, strict=True)
    return round(float(np.mean([np.abs(model_input(image, box) - goal).mean() for image, box, goal in cases])), 3)


class Original:
    """The model's inputs from the original JPEGs."""

    def __init__(self, images: list[Pixels]) -> None:
        self.images, self.windows = images, training_boxes(images)
        self.training = [model_input(image, box) for image, box in zip(images, self.windows, strict=True)]
        centers = evaluation_boxes(images)
        self.evaluation = [model_input(image, box) for image, box in zip(images, centers, strict=True)]

    def differences(self, images: list[Pixels]) -> dict[str, float]:
        """Return the differences of a set with the same samples."""
        windows, scaled = training_boxes(images), self.windows * scales(images, self.images)
        near = np.abs(windows - scaled).max(axis=1) <= SAME_WINDOW
        return {
            "training": difference(images, windows, self.training),
            "training, scaled window": difference(images, scaled, self.training),
            "evaluation": difference(images, evaluation_boxes(images), self.evaluation),
            "same windows": round(float(near.mean()), 4),
        }


def compare_choices(original: Original) -> dict[str, dict[str, float]]:
    """Shrink the original images with every filter, and encode them in every way."""
    results: dict[str, dict[str, float]] = {}
    rules = ImageRules(short_side=SHORT_SIDE)
    targets = [target_size(image.shape[1], image.shape[0], rules) for image in original.images]
    for name in FILTERS:
        start = time.process_time()
        shrunk = [
            image if size is None else np.asarray(Image.fromarray(image).resize(size, Image.Resampling[name]))
            for image, size in zip(original.images, targets, strict=True)
        ]
        milliseconds = (time.process_time() - start) / len(shrunk) * 1e3
        for encoding in ENCODINGS:
            images, size = shrunk, sum(image.nbytes for image in shrunk)
            if encoding != "pixels":
                jpegs = [simplejpeg.encode_jpeg(image, QUALITY, "RGB", encoding.replace(":", "")) for image in shrunk]
                images, size = [simplejpeg.decode_jpeg(jpeg, "RGB") for jpeg in jpegs], sum(map(len, jpegs))
            differences = original.differences(images)
            results[f"{name.lower()}, {encoding}"] = {
                "resize, ms": round(milliseconds, 2),
                "bytes": round(size / len(images)),
                **{each: differences[each] for each in ("training, scaled window", "evaluation")},
            }
    return results


def shown(options: Options) -> str:
    return f"--rounds {options.rounds} --images {options.images} --count {options.count}"


def main(options: Options) -> None:
    cpu = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        pipeline(["sample", "photos", f"{root / 'photos'}", "--count", f"{options.count}"])
        for name, arguments in SETS.items():
            out = ["--out", f"{root / name}", "--shard-size", "8", "--workers", "1"]
            pipeline(["shard", f"{root / 'photos'}", *out, *arguments])
        makers = {name: partial(ours, Photos(root / "photos", root / name), cpu, "auto") for name in SETS}
        turns = run_interleaved(makers, rounds=options.rounds, units=options.images, warm_up=options.images // 4)
        loaders = medians(turns)
        original = Original(decode_set(root / "original JPEGs").images)
        sets: dict[str, dict[str, Any]] = {}
        for name in SETS:
            found = decode_set(root / name)
            sets[name] = {
                "bytes": round(found.bytes),
                "decode, ms": round(found.milliseconds, 2),
                "loader, ms": round(loaders[name]["cpu"] * 1e3, 2),
                "loader, images/s": round(loaders[name]["rate"]),
                **original.differences(found.images),
            }
        choices = compare_choices(original)
        result = {"sets": sets, "choices": choices, "machine": machine(cpu), "options": shown(options)}
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))

"""Compare DALI's decoding operators (decode, crop, resize, flip) in images/s and host CPU time per image.

    python benchmarks/decode.py [--loads 0 0.5 0.65 0.8 0.9 1] [--batch 256] [--rounds 5] [--count 500] [--data DIR]
                                [--out FILE.json]

Meant for a GPU with a hardware JPEG decoder, to choose `--hw-decoder-load`. Encoded JPEGs of `pipeline sample photos`
are passed from memory, so that no file access is timed. On a GPU, DALI's `mixed` backend decodes them. Operators:

  slice    decoders.image_slice with given windows, as in training
  whole    decoders.image, then a crop of the window
  random   decoders.image_random_crop, with windows drawn by DALI, as in most DALI pipelines
  reader   like `whole`, with 768 images read by DALI's file reader
  cached   like `reader`, with decoded images cached in GPU memory (`cache_size`): all costs except decoding

The operators run alternately; medians are reported. Without a GPU there is no hardware decoder, and only the first load
is measured.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import tyro
from nvidia.dali import Pipeline, fn, types
from PIL import Image

from benchmarks.interleaved import Maker, machine, medians, run_interleaved
from launch.cli import main as pipeline
from pipeline.augment.params import crop_windows
from pipeline.augment.recipe import augment_recipe
from shards.cores import cores

SIZE = 224
RECIPE = augment_recipe("light", size=SIZE)
OPERATORS = ("slice", "whole", "random")
FROM_FILES = ("reader", "cached")  # DALI's cache identifies an image by its file name, so DALI must read the files
FILES = 768
CACHE = {"cache_size": 8192, "cache_type": "threshold", "cache_threshold": 0}  # cache size in MB; threshold in bytes
AHEAD = 2


@dataclass(frozen=True)
class Options:
    """Compare DALI's decoding operators."""

    loads: tuple[float, ...] = (0.0, 0.5, 0.65, 0.8, 0.9, 1.0)
    """Fractions of the images for the hardware decoder."""
    operators: tuple[str, ...] = OPERATORS
    """Decoding operators to compare."""
    batch: int = 256
    """Images per batch."""
    rounds: int = 5
    """Number of interleaved rounds."""
    batches: int = 8
    """Number of batches per operator and round."""
    count: int = 500
    """Number of photos to generate."""
    data: Path | None = None
    """Folder for photos/, which are generated if they do not exist. Default: a temporary folder."""
    out: Path | None = None
    """Write the results to this JSON file."""


def photo_paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("train/*/*.JPEG"))


def photos(folder: Path) -> tuple[list[np.ndarray], np.ndarray]:
    """Read the encoded images, and their heights and widths, int [n, 2]."""
    paths = photo_paths(folder)
    sizes = [Image.open(path).size for path in paths]
    return [np.frombuffer(path.read_bytes(), np.uint8) for path in paths], np.array(sizes).reshape(-1, 2)[:, ::-1]


def decode(operator: str, load: float, images: list[np.ndarray], sizes: np.ndarray, options: Options) -> Iterator[int]:
    gpu = torch.cuda.is_available()
    rng = itertools.count()
    by_file = operator in FROM_FILES
    if by_file:
        assert options.data is not None, "set by main"
        paths, images = photo_paths(options.data / "photos")[:FILES], images[:FILES]

    def batch() -> tuple[Any, ...]:
        number = next(rng)
        ids = (np.arange(options.batch) + number * options.batch) % len(images)
        high, wide = sizes[ids].T
        windows = crop_windows(RECIPE, seed=0, epoch=number, ids=ids, heights=high, widths=wide).astype(np.int32)
        start, shape = np.split(windows, 2, axis=1)
        flip = (ids % 2).astype(np.int32)[:, None]
        handed = [images[i] for i in ids], flip
        return handed if operator == "random" else (*handed, np.ascontiguousarray(start), np.ascontiguousarray(shape))

    pipe = Pipeline(
        batch_size=options.batch,
        num_threads=cores(),
        device_id=0 if gpu else None,
        prefetch_queue_depth=AHEAD,
        seed=0,
    )
    decoder: dict[str, Any] = {"device": "mixed" if gpu else "cpu", "output_type": types.RGB}
    if gpu:
        decoder["hw_decoder_load"] = load
    with pipe:
        given = fn.external_source(source=batch, num_outputs=2 if operator == "random" else 4, batch=True)
        encoded, flip, *window = given
        if by_file:
            encoded, _ = fn.readers.file(files=[str(path) for path in paths])
        if operator == "slice":
            start, shape = window
            out = fn.decoders.image_slice(
                encoded, start=start, shape=shape, axis_names="HW", adjust_orientation=False, **decoder
            )
        elif operator in {"whole", *FROM_FILES}:
            cache: dict[str, Any] = CACHE if operator == "cached" else {}
            out = fn.decoders.image(encoded, adjust_orientation=False, **decoder, **cache)
            out = fn.slice(out, start=window[0], shape=window[1], axis_names="HW")
        else:
            out = fn.decoders.image_random_crop(
                encoded,
                random_area=list(RECIPE.scale),
                random_aspect_ratio=list(RECIPE.ratio),
                adjust_orientation=False,
                **decoder,
            )
        out = fn.resize(out, size=[SIZE, SIZE], interp_type=types.INTERP_CUBIC, antialias=True)
        pipe.set_outputs(fn.flip(out, horizontal=flip))
    pipe.build()
    while True:
        (decoded,) = pipe.run()
        if gpu:
            torch.cuda.synchronize()
        yield len(decoded)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loads = options.loads if device.type == "cuda" else options.loads[:1]
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.data or Path(temporary)) / "photos"
        if not folder.exists():
            assert pipeline(["sample", "photos", str(folder), "--count", str(options.count)]) == 0
        images, sizes = photos(folder)
        makers: dict[str, Maker] = {
            f"{operator}, hardware {load:g}" if device.type == "cuda" else operator: partial(
                decode, operator, load, images, sizes, replace(options, data=folder.parent)
            )
            for operator in options.operators
            for load in loads
        }
        units = options.batches * options.batch
        turns = run_interleaved(makers, rounds=options.rounds, units=units, warm_up=3 * options.batch)
    settings = {"batch": options.batch, "rounds": options.rounds, "threads": cores()}
    result = {"machine": machine(device), "settings": settings, "medians": medians(turns)}
    for name, figures in sorted(result["medians"].items(), key=lambda item: -item[1]["rate"]):
        print(f"{name:24s} {figures['rate']:9,.0f} images/s  {figures['cpu'] * 1e6:6.0f} us of CPU per image")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Compare this project's loaders with those of other projects, in images/s, on the same JPEG files.

All of them do a random resized crop to 224 pixels, horizontal flip and normalization to float32, in batches of 64 in
random order, on photos of `pipeline sample photos`, with as many threads or workers as there are cores. Each is used as
its documentation recommends for speed, without a GPU except for DALI and FFCV:

- ours, DALI / ours, FFCV: in the order of the plan (fully random), with the hash of every sample verified
- ours, DALI, fat: with the paper's augmentation; the additional time is the cost of augmentation
- DALI's own: DALI's webdataset reader with a shuffle buffer of 1024 and the same operators (bicubic, antialiased);
  the output is used without a copy
- FFCV's own: FFCV's Loader on the same .beton, RANDOM order, page cache
- torchvision: files in a DataLoader; decoded by libjpeg-turbo (simplejpeg), then transforms v2 on uint8 tensors
  (bicubic, antialiased)
- webdataset, mosaicml-streaming, litData: their data sets and worker processes with the same decoding and transforms;
  resampled tars with a shuffle buffer of 1024, MDS shards, and optimized chunks, all on the local disk
- SPDL: files in a pipeline of threads, with FFmpeg (decoding, crop, bicubic resize, flip) or with the same decoding and
  transforms as torchvision's row
- Grain: ArrayRecord files, worker processes, the same decoding and transforms
- PIL: a DataLoader over the files, with the same crop windows as ours
- ours, pixels: the same photos stored as pixels with a short side of 256, and read from the page cache

`make peers` installs the libraries. Rows of missing libraries are omitted, with the reason. Use an otherwise idle
machine.

    python benchmarks/loader.py [--rounds 7] [--images 2048] [--count 2000] [--data DIR] [--loaders NAME ...]
                                [--out FILE.json]
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import tyro

from benchmarks.interleaved import Maker, machine, medians, ratio, run_interleaved
from benchmarks.loaders import ours, threads, torch_workers
from benchmarks.loaders.work import BATCH, SIZE, WARM_UP, NotInstalled, Photos
from launch.cli import main as pipeline

FULL, PIXELS = "ours, DALI, fat", "ours, pixels"
OTHER_WORK = (FULL, PIXELS)
"""Rows that augment more, or do not decode JPEGs."""


@dataclass(frozen=True)
class Options:
    """Compare loaders."""

    rounds: int = 7
    """Number of interleaved rounds."""
    images: int = 2048
    """Images per loader and round."""
    count: int = 2000
    """Number of photos to generate."""
    data: Path | None = None
    """Folder for photos/, photos-shards/ and the other formats, generated if they do not exist. Default: a temporary
    folder."""
    loaders: tuple[str, ...] = ()
    """Names of the loaders to measure, as in the table. Default: all."""
    out: Path | None = None
    """Write the results to this JSON file."""


def all_loaders(photos: Photos, pixels: Photos, device: torch.device) -> dict[str, Maker]:
    """Return the loaders by name; those of this project first."""
    return {
        "ours, DALI": partial(ours.ours, photos, device, "dali"),
        "ours, FFCV": partial(ours.ours, photos, device, "ffcv"),
        FULL: partial(ours.ours, photos, device, "dali", "fat"),
        PIXELS: partial(ours.ours, pixels, device, "dali"),
        "DALI's own": partial(ours.dali, photos, device),
        "FFCV's own": partial(ours.ffcv, photos, device),
        "SPDL, FFmpeg": partial(threads.spdl_ffmpeg, photos),
        "SPDL, torchvision": partial(threads.spdl_torchvision, photos),
        "torchvision DataLoader": partial(torch_workers.torchvision, photos),
        "webdataset": partial(torch_workers.webdataset, photos),
        "mosaicml-streaming": partial(torch_workers.mosaicml, photos),
        "litData": partial(torch_workers.litdata, photos),
        "Grain": partial(threads.grain, photos),
        "PIL DataLoader": partial(torch_workers.pil, photos),
    }


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    has_ffcv = importlib.util.find_spec("ffcv") is not None
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.data or Path(temporary)
        photos = Photos(folder / "photos", folder / "photos-shards")
        if not photos.shards.exists():
            form = ["--shard-size", "32", *(["--format", "both"] if has_ffcv else [])]
            assert pipeline(["sample", "photos", str(photos.files), "--count", str(options.count)]) == 0
            assert pipeline(["shard", str(photos.files), "--out", str(photos.shards), *form]) == 0
        pixels = Photos(photos.files, folder / "photos-pixels")
        if not pixels.shards.exists():
            form = ["--shard-size", "32", "--pixels", "--short-side", "256"]
            assert pipeline(["shard", str(photos.files), "--out", str(pixels.shards), *form]) == 0
        makers = all_loaders(photos, pixels, device)
        makers, missing = installed({name: makers[name] for name in options.loaders or makers})
        turns = run_interleaved(makers, rounds=options.rounds, units=options.images, warm_up=WARM_UP)
    result: dict[str, Any] = {
        "machine": machine(device),
        "settings": {"batch": BATCH, "size": SIZE, "rounds": options.rounds, "images": options.images},
        "medians": medians(turns),
        "not_installed": missing,
    }
    rates = {name: figures["rate"] for name, figures in result["medians"].items() if name not in OTHER_WORK}
    fastest = max((name for name in rates if name.startswith("ours")), key=rates.__getitem__, default=None)
    peers = sorted((name for name in rates if not name.startswith("ours")), key=rates.__getitem__, reverse=True)
    if fastest is not None:
        result["ratios"] = {f"{fastest} / {name}": ratio(turns, fastest, name) for name in peers}
        if fastest != "ours, FFCV" and {"ours, FFCV", "FFCV's own"} <= rates.keys():
            result["ratios"]["ours, FFCV / FFCV's own"] = ratio(turns, "ours, FFCV", "FFCV's own")
    if {PIXELS, "ours, DALI"} <= turns.keys():
        result.setdefault("ratios", {})["ours, pixels / ours, DALI"] = ratio(turns, PIXELS, "ours, DALI")
    if {FULL, "ours, DALI"} <= turns.keys():
        found = result["medians"]
        result["fat_beyond_decoding_us"] = 1e6 * (found[FULL]["cpu"] - found["ours, DALI"]["cpu"])
    show(result)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def installed(makers: dict[str, Maker]) -> tuple[dict[str, Maker], dict[str, str]]:
    """Start every loader once, which also converts the files to its format.

    Returns:
        The loaders that can be measured, and for each of the others the reason.
    """
    found, missing = dict[str, Maker](), dict[str, str]()
    for name, maker in makers.items():
        loader = maker()
        try:
            next(loader)
            found[name] = maker
        except NotInstalled as error:
            missing[name] = str(error)
        finally:
            loader.close()  # type: ignore[attr-defined]
    return found, missing


def show(result: dict[str, Any]) -> None:
    print(f"\n{result['machine']['cpu']}, {result['machine']['cores']} cores, load {result['machine']['load']:.1f}")
    for name, figures in result["medians"].items():
        print(f"{name:24s} {figures['rate']:7.0f} images/s  {figures['cpu'] * 1e6:6.0f} us of CPU per image")
    for name, reason in result["not_installed"].items():
        print(f"{name:24s} not installed ({reason})")
    for name, figures in result.get("ratios", {}).items():
        print(f"{name:36s} {figures['rate']:5.2f} by rate, {figures['cpu']:5.2f} by CPU time (median of ratios)")
    if "fat_beyond_decoding_us" in result:
        print(f"augmentation of the recipe fat: {result['fat_beyond_decoding_us']:.0f} us of CPU per image")


if __name__ == "__main__":
    main()

"""Compare `pipeline shard` with other tools that do the same work with as many processes, in images/s.

Photos of `pipeline sample photos` are read from and written to memory (--work, /dev/shm by default), so that the speed
of the disk does not matter. The tools run alternately. Medians of --rounds and of the ratios in a round are reported.

- check: `pipeline shard` (which decodes every image to verify it), compared with the decoder alone (simplejpeg, full
  size, RGB, images already in memory) and with webdataset's ShardWriter plus verification by the same decoder
- pack: `pipeline shard --check header`, compared with `tar cf` of the same folder and with ShardWriter alone
- ffcv: `pipeline shard --format ffcv --max-side 400 --quality 90`, compared with FFCV's DatasetWriter with
  RGBImageField(write_mode='jpg', max_resolution=400, jpeg_quality=90) on images opened by Pillow

Needs webdataset and FFCV, no GPU, and at least --processes idle cores.

    python benchmarks/shard.py [--rounds 7] [--count 4000] [--processes 2] [--work DIR] [--out FILE.json]
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import simplejpeg
import tyro
from PIL import Image

from shards.commands.samples import write_photos
from shards.convert.convert import convert
from shards.convert.options import Options as ConvertOptions
from shards.cores import cores
from shards.format.beton import BetonOptions
from shards.images.rules import ImageRules
from shards.sources.scan import ScanOptions

SHARD_BYTES = 32 * 2**20
MAX_SIDE, QUALITY = 400, 90
PACK_COPIES = 4  # copies of each photo for `pack`, which would be too short to time otherwise
PACKERS = ("pipeline shard --check header", "ShardWriter", "tar cf")
IMAGENET = 1_281_167


@dataclass(frozen=True)
class Options:
    """Compare sharding tools."""

    rounds: int = 7
    """Number of interleaved rounds."""
    count: int = 4000
    """Number of photos to generate."""
    processes: int = 2
    """Number of worker processes of each tool."""
    work: Path = Path("/dev/shm")
    """Folder for sources and results; a temporary subfolder is created and removed."""
    out: Path | None = None
    """Write the results to this JSON file."""


def pipeline_shard(source: Path, out: Path, processes: int, rules: ImageRules, beton: bool = False) -> None:
    options = ConvertOptions(
        shard_bytes=SHARD_BYTES,
        rules=rules,
        format="ffcv" if beton else "tar",
        beton=BetonOptions(mode="jpg"),
        scan=ScanOptions(workers=processes),
    )
    convert(source, out, options)


def decoder_alone(files: list[Path]) -> float:
    """Return the seconds for decoding images that are already in memory."""
    encoded = [file.read_bytes() for file in files]
    began = time.perf_counter()
    for data in encoded:
        simplejpeg.decode_jpeg(data, strict=True)
    return time.perf_counter() - began


def shard_writer(job: tuple[list[tuple[Path, int]], Path, bool]) -> None:
    """Read, verify and write samples with webdataset, as its documentation shows."""
    import webdataset

    samples, out, check = job
    out.mkdir()
    with webdataset.ShardWriter(str(out / "train-%06d.tar"), maxsize=SHARD_BYTES, maxcount=10**9, verbose=0) as sink:
        for path, label in samples:
            data = path.read_bytes()
            if check:
                simplejpeg.decode_jpeg(data, strict=True)
            sink.write({"__key__": path.stem, "jpg": data, "cls": str(label).encode()})


class Opened:
    """A data set for FFCV's writer."""

    def __init__(self, samples: list[tuple[Path, int]]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        path, label = self.samples[i]
        return Image.open(path).convert("RGB"), label


def ffcv_writer(samples: list[tuple[Path, int]], out: Path, processes: int) -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    out.mkdir()
    image = RGBImageField(write_mode="jpg", max_resolution=MAX_SIDE, jpeg_quality=QUALITY)
    writer = DatasetWriter(str(out / "train.beton"), {"image": image, "label": IntField()}, num_workers=processes)
    writer.from_indexed_dataset(Opened(samples))


def main(options: Options) -> None:
    load = os.getloadavg()[0]
    work = Path(tempfile.mkdtemp(dir=options.work))
    try:
        result = compare(options, work) | {"machine": machine(options, load)}
    finally:
        shutil.rmtree(work)
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def compare(options: Options, work: Path) -> dict[str, object]:
    source, processes = work / "photos", options.processes
    write_photos(source, options.count)
    classes = sorted(path.name for path in (source / "train").iterdir())
    samples = [(path, classes.index(path.parent.name)) for path in sorted(source.rglob("*.JPEG"))]
    total = sum(path.stat().st_size for path, _ in samples)
    chunks = [samples[i::processes] for i in range(processes)]

    many = work / "many"
    for path, _ in samples:
        for copy in range(PACK_COPIES):
            target = many / path.parent.name / f"{copy}_{path.name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    files = [(path, classes.index(path.parent.name)) for path in sorted(many.rglob("*.JPEG"))]

    def webdataset_with(check: bool) -> Callable[[Path], None]:
        def write(out: Path) -> None:
            out.mkdir()
            work = chunks if check else [files[i::processes] for i in range(processes)]
            with ProcessPoolExecutor(processes) as pool:
                list(pool.map(shard_writer, [(chunk, out / str(i), check) for i, chunk in enumerate(work)]))

        return write

    contenders: dict[str, Callable[[Path], object]] = {
        "pipeline shard": lambda out: pipeline_shard(source, out, processes, ImageRules()),
        "ShardWriter, decoding": webdataset_with(check=True),
        "pipeline shard --check header": lambda out: pipeline_shard(many, out, processes, ImageRules(check="header")),
        "ShardWriter": webdataset_with(check=False),
        "tar cf": lambda out: subprocess.run(["tar", "cf", out, "-C", many, "."], check=True),
        "pipeline shard --format ffcv --max-side 400": lambda out: pipeline_shard(
            source, out, processes, ImageRules(max_side=MAX_SIDE, quality=QUALITY), beton=True
        ),
        "FFCV DatasetWriter": lambda out: ffcv_writer(samples, out, processes),
    }
    seconds: dict[str, list[float]] = {name: [] for name in [*contenders, "decoder alone"]}
    for turn in range(options.rounds):
        for name, contender in contenders.items():
            seconds[name].append(measure(contender, work / "out"))
            print(f"round {turn + 1}: {name}: {seconds[name][-1]:.1f} s", file=sys.stderr)
        with ProcessPoolExecutor(processes) as pool:
            paths_of_chunks = [[path for path, _ in chunk] for chunk in chunks]
            seconds["decoder alone"].append(max(pool.map(decoder_alone, paths_of_chunks)))
    return report(seconds, options, total)


def measure(contender: Callable[[Path], object], out: Path) -> float:
    """Return the seconds of one run, including start and end of its processes."""
    began = time.perf_counter()
    contender(out)
    took = time.perf_counter() - began
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    return took


def report(seconds: dict[str, list[float]], options: Options, total: int) -> dict[str, object]:
    def faster(ours: str, theirs: str) -> float:
        pairs = zip(seconds[ours], seconds[theirs], strict=True)
        return round(statistics.median(their / our for our, their in pairs), 3)

    images = {name: options.count * (PACK_COPIES if name in PACKERS else 1) for name in seconds}
    rate = {name: images[name] / statistics.median(times) for name, times in seconds.items()}
    return {
        "images": options.count,
        "bytes": total,
        "processes": options.processes,
        "rounds": options.rounds,
        "images/s": {name: round(value) for name, value in rate.items()},
        "MB/s": {name: round(value * total / options.count / 1e6, 1) for name, value in rate.items()},
        "ratios": {
            "check / decoder alone": faster("pipeline shard", "decoder alone"),
            "check / ShardWriter": faster("pipeline shard", "ShardWriter, decoding"),
            "pack / tar cf": faster("pipeline shard --check header", "tar cf"),
            "pack / ShardWriter": faster("pipeline shard --check header", "ShardWriter"),
            "ffcv / DatasetWriter": faster("pipeline shard --format ffcv --max-side 400", "FFCV DatasetWriter"),
        },
        "ImageNet-1K, training split, minutes": round(IMAGENET / rate["pipeline shard"] / 60, 1),
    }


def machine(options: Options, load: float) -> dict[str, object]:
    """Describe the machine and its load before the benchmark."""
    from launch.machine.provenance import cpu_name  # imports torch, which the converting processes do not need

    return {
        "cpu": cpu_name(),
        "cores": cores(),
        "load before": load,
        "python": platform.python_version(),
        "work": str(options.work),
    }


if __name__ == "__main__":
    main(tyro.cli(Options))

"""How fast sharding is, beside tools that do the same work on as many processes, in one run.

Photos as `pipeline sample photos` makes them, from memory to memory (`--work`, by default /dev/shm), so that it is
the tools that are compared and not the disk. All take turns; medians of `--rounds`, ratios within a round, by the clock
and by the time of all cores (which is what counts where a machine is shared).

- check: `pipeline shard` (every image decoded for a check) against the decoder alone (simplejpeg, full size, RGB, on
  encoded images already in memory), and against webdataset's ShardWriter with that decoder as its check;
- pack: `pipeline shard --check header` against `tar cf` of the same folder, and against ShardWriter without a check;
- ffcv: `pipeline shard --format ffcv --max-side 400 --quality 90` against FFCV's DatasetWriter with
  RGBImageField(write_mode='jpg', max_resolution=400, jpeg_quality=90) on images opened by Pillow.

    python benchmarks/shard.py [--rounds 7] [--count 5000] [--processes 2] [--out FILE.json]
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import resource
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

from shards.beton import BetonOptions
from shards.convert import Options as ConvertOptions
from shards.convert import convert
from shards.images import ImageRules
from shards.samples import write_photos
from shards.sources.scan import ScanOptions

SHARD_BYTES = 32 * 2**20
MAX_SIDE, QUALITY = 400, 90
PACK_COPIES = 4  # of the photos: packing is too quick for fewer
PACKERS = ("pipeline shard --check header", "ShardWriter", "tar cf")
IMAGENET = 1_281_167


@dataclass(frozen=True)
class Options:
    """Compare sharding tools."""

    rounds: int = 7
    """Interleaved rounds."""
    count: int = 5000
    """Photos to make."""
    processes: int = 2
    """Worker processes of each tool."""
    work: Path = Path("/dev/shm")
    """Where to read and write."""
    out: Path | None = None
    """JSON file for the figures."""


def pipeline_shard(source: Path, out: Path, processes: int, rules: ImageRules, beton: bool = False) -> None:
    options = ConvertOptions(
        shard_bytes=SHARD_BYTES,
        rules=rules,
        format="ffcv" if beton else "tar",
        beton=BetonOptions(mode="jpg"),
        scan=ScanOptions(workers=processes),
    )
    convert(source, out, options)


@dataclass(frozen=True)
class Spent:
    """Seconds by the clock, and of all cores."""

    wall: float
    cpu: float


def decoder_alone(files: list[Path]) -> Spent:
    """Decode images that are in memory."""
    encoded = [file.read_bytes() for file in files]
    wall, cpu = time.perf_counter(), time.process_time()
    for data in encoded:
        simplejpeg.decode_jpeg(data, strict=True)
    return Spent(time.perf_counter() - wall, time.process_time() - cpu)


def shard_writer(job: tuple[list[tuple[Path, int]], Path, bool]) -> None:
    """What people write with webdataset: read, check, write."""
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
    work = Path(tempfile.mkdtemp(dir=options.work))
    try:
        result = compare(options, work)
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
    shares = [samples[i::processes] for i in range(processes)]

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
            work = shares if check else [files[i::processes] for i in range(processes)]
            with ProcessPoolExecutor(processes) as pool:
                list(pool.map(shard_writer, [(share, out / str(i), check) for i, share in enumerate(work)]))

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
    spent: dict[str, list[Spent]] = {name: [] for name in [*contenders, "decoder alone"]}
    for turn in range(options.rounds):
        for name, contender in contenders.items():
            spent[name].append(measure(contender, work / "out"))
            print(f"round {turn + 1}: {name}: {spent[name][-1].wall:.1f} s", file=sys.stderr)
        with ProcessPoolExecutor(processes) as pool:
            alone = list(pool.map(decoder_alone, [[path for path, _ in share] for share in shares]))
        spent["decoder alone"].append(Spent(max(s.wall for s in alone), sum(s.cpu for s in alone)))
    return report(spent, options, total)


def measure(contender: Callable[[Path], object], out: Path) -> Spent:
    """Run it once, start and end of its processes included."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    contender(out)
    multiprocessing.active_children()  # waits for those that have ended, so that their time is counted
    spent = Spent(time.perf_counter() - wall, cpu_seconds() - cpu)
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    return spent


def cpu_seconds() -> float:
    """Of this process and of its children that have ended, in user and kernel mode."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def report(spent: dict[str, list[Spent]], options: Options, total: int) -> dict[str, object]:
    def ratios(ours: str, theirs: str) -> dict[str, float]:
        pairs = list(zip(spent[ours], spent[theirs], strict=True))
        return {
            "by the clock": round(statistics.median(b.wall / a.wall for a, b in pairs), 3),
            "per core": round(statistics.median(b.cpu / a.cpu for a, b in pairs), 3),
        }

    images = {name: options.count * (PACK_COPIES if name in PACKERS else 1) for name in spent}
    rate = {name: images[name] / statistics.median(one.wall for one in ones) for name, ones in spent.items()}
    return {
        "images": options.count,
        "bytes": total,
        "processes": options.processes,
        "rounds": options.rounds,
        "images/s": {name: round(value) for name, value in rate.items()},
        "CPU ms/image": {
            name: round(1e3 * statistics.median(one.cpu for one in ones) / images[name], 3)
            for name, ones in spent.items()
        },
        "MB/s": {name: round(value * total / options.count / 1e6, 1) for name, value in rate.items()},
        "ratios": {
            "check / decoder alone": ratios("pipeline shard", "decoder alone"),
            "check / ShardWriter": ratios("pipeline shard", "ShardWriter, decoding"),
            "pack / tar cf": ratios("pipeline shard --check header", "tar cf"),
            "pack / ShardWriter": ratios("pipeline shard --check header", "ShardWriter"),
            "ffcv / DatasetWriter": ratios("pipeline shard --format ffcv --max-side 400", "FFCV DatasetWriter"),
        },
        "ImageNet-1K, training split, minutes": round(IMAGENET / rate["pipeline shard"] / 60, 1),
        "machine": {
            "cpu": cpu(),
            "cores": len(os.sched_getaffinity(0)),
            "python": platform.python_version(),
            "work": str(options.work),
        },
    }


def cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main(tyro.cli(Options))

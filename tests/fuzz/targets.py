"""The parsers of untrusted data, and valid files for each."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import os
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pillow_heif
import pillow_jxl  # noqa: F401
import torch
import xxhash
from PIL import Image, ImageCms

import fat
from launch.config.command_line import apply_file
from launch.config.recipe import Recipe
from launch.monitor.goodput import goodput
from launch.monitor.goodput_table import describe
from launch.monitor.panels import PANELS, Axis, downsampled, means
from launch.report.loaded_run import load_runs
from launch.report.options import chosen
from launch.report.summary import summarize
from launch.resilience import heartbeat
from launch.run.checkpoint import META, Fingerprint
from launch.run.checkpoint_folder import CheckpointFolder
from launch.run.evaluation_record import RECORD_NAME, EvaluationInfo, EvaluationRecord, read_evaluation
from launch.run.metrics_file import METRICS_NAME, final_timeline, read_metrics
from launch.run.progress import Progress
from launch.run.saved_recipe import CLASSES_NAME, RECIPE_NAME, read_saved_run, restore_class_names
from launch.run.status import STATUS_NAME, read_status
from pipeline.storage.placement import open_storage
from shards.convert.convert import convert
from shards.convert.options import Options
from shards.convert.parts import ConversionPart
from shards.convert.work_folder import MARKER, WorkFolder
from shards.errors import UserError
from shards.format.beton import BetonOptions
from shards.format.dataset import ShardSet
from shards.format.manifest import MANIFEST_NAME
from shards.images.accept import accept
from shards.images.rules import ImageRules, Rejected
from shards.sources.layouts.detect import scan
from shards.sources.naming.classes import read_classes
from shards.sources.scan import ScanOptions
from tests.fuzz.mutate import dumps
from tests.fuzz.runner import Target
from tests.support.run_folders import write_run

pillow_heif.register_heif_opener()  # for creating seeds
SIDE = 16
CLASSES = ("ant", "bee")


def _jpeg(seed: int = 0, kind: str = "JPEG", mode: str = "RGB", **options: Any) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (SIDE, SIDE, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, kind, **options)
    return out.getvalue()


def _tar(entries: list[tuple[str, bytes]], mode: str = "w", **options: Any) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode, **options) as tar:  # type: ignore[call-overload]
        for name, data in entries:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


# Shard sets


def _images(folder: Path) -> Path:
    for split, count in (("train", 6), ("val", 2)):
        for label, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                (folder / split / name / f"{i}.jpg").write_bytes(_jpeg(10 * label + i))
    return folder


def _set(folder: Path, **options: Any) -> Path:
    out = folder / "set"
    convert(_images(folder / "images"), out, Options(scan=ScanOptions(workers=1), **options))
    return out


def _manifest_of(path: Path) -> dict[str, Any]:
    return dict(json.loads((path / MANIFEST_NAME).read_bytes()))


def _sealed(document: Any) -> bytes:
    """Encode a manifest with an updated hash."""
    content = {key: value for key, value in document.items() if key != "hash"}
    text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    return dumps(content | {"hash": xxhash.xxh3_64_hexdigest(text.encode("utf-8", "surrogatepass"))})


def _use(path: Path, *, beton: bool = False) -> None:
    """Open a set like training does."""
    dataset = ShardSet(path)
    for split in dataset.manifest.splits:
        dataset.shard_samples(split)
        dataset.check_sizes(split)
        storage = open_storage(dataset, split, beton=beton)
        storage.locate(np.arange(min(len(storage.index), 16)))
    [entry.title for entry in dataset.manifest.classes]


class SetTarget:
    """A set of which one file is replaced; its other files are hard links to a valid set."""

    def __init__(self, file: str, **options: Any) -> None:
        self.file, self.options = file, options
        self._folder = Path()

    def seeds(self, folder: Path) -> list[bytes]:
        self._folder = _set(folder, **self.options)
        return [(self._folder / self.file).read_bytes()]

    def parse(self, content: bytes, folder: Path) -> None:
        if not self._folder.name:  # when a saved input is replayed
            (folder / "made").mkdir()
            self._folder = _set(folder / "made", **self.options)
        for path in self._folder.iterdir():
            os.link(path, folder / path.name)
        (folder / self.file).unlink()
        (folder / self.file).write_bytes(content)
        self.reseal(content, folder)
        _use(folder, beton="beton" in self.file)

    def reseal(self, content: bytes, folder: Path) -> None:
        """Update the hash of the mutated file in the manifest, so that the hash check does not reject it first."""
        if self.file == MANIFEST_NAME:
            return
        manifest = _manifest_of(folder)
        split = manifest["splits"]["train"]
        digest = xxhash.xxh3_64_hexdigest(content)
        for entry in (split, split["beton"]):
            if entry and self.file == entry["index"]:
                entry["index_hash"] = digest
        (folder / MANIFEST_NAME).unlink()
        (folder / MANIFEST_NAME).write_bytes(_sealed(manifest))


# Conversion


class SourceTarget:
    """A source folder of which one file is replaced."""

    def __init__(self, files: Callable[[], dict[str, bytes]], file: str) -> None:
        self._files, self._file = files, file
        self._made: dict[str, bytes] = {}

    def seeds(self, folder: Path) -> list[bytes]:
        return [self._content()[self._file]]

    def _content(self) -> dict[str, bytes]:
        self._made = self._made or self._files()
        return self._made

    def parse(self, content: bytes, folder: Path) -> None:
        for name, data in (self._content() | {self._file: content}).items():
            path = folder / "source" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        (folder / "spool").mkdir()
        # Two workers, so that pyarrow runs in a worker process: it crashes on some damaged files.
        scan(folder / "source", ScanOptions(workers=2), folder / "spool")


def _webdataset() -> dict[str, bytes]:
    entries = [
        (f"s{i}.{suffix}", data) for i in range(4) for suffix, data in (("jpg", _jpeg(i)), ("cls", b"%d" % (i % 2)))
    ]
    return {"a.tar": _tar(entries, format=tarfile.PAX_FORMAT)}


def _ilsvrc() -> dict[str, bytes]:
    import scipy.io

    synsets = ("n00000001", "n00000002")
    train = _tar([(f"{name}.tar", _tar([(f"{name}_{i}.JPEG", _jpeg(i)) for i in range(2)])) for name in synsets])
    rows = [(i + 1, name, f"thing {i}", 0) for i, name in enumerate(synsets)]
    table = np.array(rows, dtype=[(n, "O") for n in ("ILSVRC2012_ID", "WNID", "words", "num_children")])
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": table})
    kit = _tar([("kit/data/meta.mat", meta.getvalue()), ("kit/data/ILSVRC2012_validation_ground_truth.txt", b"1\n2\n")])
    val = _tar([(f"ILSVRC2012_val_{i:08d}.JPEG", _jpeg(i)) for i in (1, 2)])
    return {
        "ILSVRC2012_img_train.tar": train,
        "ILSVRC2012_img_val.tar": val,
        "ILSVRC2012_devkit_t12.tar.gz": gzip.compress(kit, 1),
        "ILSVRC2012_devkit_t12/data/meta.mat": meta.getvalue(),
    }


def _devkit_folder() -> dict[str, bytes]:
    files = _ilsvrc()
    del files["ILSVRC2012_devkit_t12.tar.gz"]
    return files | {"ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": b"1\n2\n"}


def _kaggle() -> dict[str, bytes]:
    data = "ILSVRC/Data/CLS-LOC"
    images = {f"{data}/train/n0000000{k}/{i}.JPEG": _jpeg(i) for k in (1, 2) for i in range(2)}
    images |= {f"{data}/val/ILSVRC2012_val_0000000{i}.JPEG": _jpeg(i) for i in (1, 2)}
    solution = "ImageId,PredictionString\n" + "".join(
        f"ILSVRC2012_val_0000000{i},n0000000{i} 1 2 3 4\n" for i in (1, 2)
    )
    return images | {
        "LOC_val_solution.csv": solution.encode(),
        "LOC_synset_mapping.txt": b"n00000001 tench, Tinca tinca\nn00000002 goldfish\n",
    }


def _parquet() -> dict[str, bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    features = {"info": {"features": {"label": {"names": list(CLASSES)}}}}
    table = pa.table(
        {"image": [{"bytes": _jpeg(i), "path": f"{i}.jpg"} for i in range(4)], "label": [0, 1, 0, 1]}
    ).replace_schema_metadata({"huggingface": json.dumps(features)})
    out = io.BytesIO()
    pq.write_table(table, out)
    return {"train-0.parquet": out.getvalue()}


def _parse_class_list(content: bytes, folder: Path) -> None:
    (folder / "classes.txt").write_bytes(content)
    read_classes(folder / "classes.txt")


class WorkTarget:
    """The conversion plan in the work folder of an unfinished conversion."""

    def seeds(self, folder: Path) -> list[bytes]:
        convert(_images(folder / "images"), folder / "set", Options(scan=ScanOptions(workers=1)), ConversionPart(1, 2))
        return [(WorkFolder(folder / "set").path / "plan.json").read_bytes()]

    def parse(self, content: bytes, folder: Path) -> None:
        work = WorkFolder(folder)
        work.path.mkdir()
        (work.path / "plan.json").write_bytes(content)
        (work.path / MARKER).touch()
        plan = work.load_plan()
        if plan is not None:
            _ = (plan.jobs[:10], plan.keeps_tars, plan.beton)


def _image_seeds(folder: Path) -> list[bytes]:
    return [
        _jpeg(),
        _jpeg(progressive=True),
        _jpeg(mode="L"),
        _jpeg(mode="CMYK"),
        *(_jpeg(kind=kind) for kind in ("PNG", "BMP", "WEBP", "TIFF")),
        _jpeg(kind="GIF", mode="P"),
        _jpeg(kind="PNG", mode="RGBA"),
        *(_jpeg(kind=kind) for kind in ("PPM", "TGA", "PCX", "SGI", "QOI", "JPEG2000", "AVIF", "HEIF", "JXL")),
        _jpeg(kind="TGA", compression="tga_rle"),
        _jpeg(kind="JPEG2000", no_jp2=True),
        _jpeg(kind="JXL", use_container=True),
        b"P3 4 2 255\n" + b" 9" * 24,
        _deep_png(),
        _deep_tiff(),
        _jpeg(mode="CMYK", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()),
    ]


def _deep_png() -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.arange(256, dtype=np.uint16).reshape(SIDE, SIDE)).save(out, "PNG")
    data = out.getvalue()
    bits = b"\0\0\0\x01sBIT\x0c"
    return data[:33] + bits + struct.pack(">I", zlib.crc32(bits[4:])) + data[33:]


def _deep_tiff() -> bytes:
    out = io.BytesIO()
    samples = np.linspace(0, 1, SIDE * SIDE, dtype=np.float32).reshape(SIDE, SIDE)
    Image.fromarray(samples).save(out, "TIFF", tiffinfo={340: 0.0, 341: 1.0})
    return out.getvalue()


# Runs


class CheckpointTarget:
    """The metadata of a run's newest checkpoint."""

    def seeds(self, folder: Path) -> list[bytes]:
        return [(self._make(folder) / META).read_bytes()]

    def _make(self, folder: Path) -> Path:
        fingerprint = Fingerprint(fixed={"seed": 0, "model": "fat_b0"}, free={"lr": 1e-3})
        progress = Progress(step=14, epoch=0, epoch_step=14, best=0.5, seconds=3.5)
        return CheckpointFolder(folder / "checkpoints").save({"w": torch.zeros(2)}, progress, fingerprint)

    def parse(self, content: bytes, folder: Path) -> None:
        (self._make(folder) / META).write_bytes(content)
        found, complaints = CheckpointFolder(folder / "checkpoints").newest()
        assert (found is None) == bool(complaints)
        if found is None:
            raise UserError(complaints[0])
        assert found.progress.step == 14, "the step differs from that in the folder name"
        found.load()


def _sealed_meta(document: Any) -> bytes:
    values = {key: value for key, value in document.items() if key != "hash"}
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return dumps(values | {"hash": xxhash.xxh3_64_hexdigest(text.encode())})


class FileTarget:
    """A file that is read by one function."""

    def __init__(self, name: str, seed: Callable[[], bytes], read: Callable[[Path], object]) -> None:
        self._name, self._seed, self._read = name, seed, read

    def seeds(self, folder: Path) -> list[bytes]:
        return [self._seed()]

    def parse(self, content: bytes, folder: Path) -> None:
        (folder / self._name).write_bytes(content)
        self._read(folder / self._name)


def _metrics() -> bytes:
    start = {"kind": "start", "time": 2.0, "step": 7, "started": 1.0, "world": 1, "engine": "e", "model": "fat_b0"}
    train = {"kind": "train", "step": 8, "epoch": 1, "loss": 2.3, "lr": 1e-3, "time": 3.5, "images_per_second": 10.0}
    lines = [
        start
        | dict.fromkeys(("total_steps", "steps_per_epoch", "epochs", "global_batch"), 9)
        | {"device": "", "host": ""},
        train | {"steps": 1, "seconds": 1.5, "first_step_seconds": 1.5, "data_wait": 0.25},
        {"kind": "eval", "time": 4.5, "step": 8, "epoch": 1, "top1": 0.5, "top5": 0.9, "loss": 2.0, "samples": 3},
    ]
    return "".join(json.dumps(line) + "\n" for line in lines + lines).encode()


def _read_metrics(path: Path) -> None:
    lines = read_metrics(path.parent)
    final_timeline(lines)
    if lines:
        json.dumps(goodput(lines).to_dict(), allow_nan=False)


class ReportTarget:
    """A run folder of which one file is replaced, as `pipeline report` and `pipeline goodput` read it."""

    def __init__(self, file: str) -> None:
        self._file = file

    def seeds(self, folder: Path) -> list[bytes]:
        content = (self._make(folder / "run") / self._file).read_bytes()
        lines = [json.loads(line) for line in content.splitlines()]
        later = [line | {"kind": "later"} for line in lines if "kind" in line]  # a kind of a later version
        return [dumps(lines), dumps(lines + later)]

    def _make(self, folder: Path) -> Path:
        return write_run(folder, steps=20, log_every=5, epochs=2, ema=True, crash=(15, 10), status="running")

    def parse(self, content: bytes, folder: Path) -> None:
        run = self._make(folder / "run")
        (run / self._file).write_bytes(content)
        (loaded,) = load_runs([run])
        summarize(loaded)
        chosen(loaded)
        describe(loaded.goodput)
        for series in (series for panel in PANELS for series in panel.series):
            for axis in get_args(Axis):
                means(downsampled(loaded.timeline.points(series, axis)))
                loaded.timeline.interruptions(axis, 1.0)


def _json_lines(document: Any) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in document)


def _evaluation() -> bytes:
    rows = np.array([[0, 1, 1, 0.5, 0.6, 0.6], [1, 0, 1, 2.5, 0.1, 0.9], [2, 0, 0, 0.1, 0.9, 0.9]])
    record = EvaluationRecord.of(rows, EvaluationInfo(step=7, weights="weights", outputs=2))
    return dataclasses.replace(record, thumbnails={1: _jpeg()}).to_bytes()


def _read_evaluation(path: Path) -> None:
    record = read_evaluation(path.parent)
    assert record is not None
    _ = record.hardest


CLASS_LIST = fat.ClassList.of(CLASSES, ["Ant", None])


def _read_class_names(path: Path) -> None:
    restore_class_names(path.parent, dataclasses.replace(CLASS_LIST, folders=None, names=None))


def _saved_run() -> bytes:
    engine = {"zero": 0, "precision": "fp32", "world": 1, "device": "cpu", "cores": 2}
    return dumps({"recipe": Recipe().to_dict(), "engine": engine, "git": None})


def _beat() -> bytes:
    beat = {"start": "0123456789abcdef", "time": 1.5, "step": 7, "idle": 0.5, "host": "a", "pid": 7, "stacks": False}
    return dumps(beat | {"reaches_rank0": None, "ended": False})


RECIPE = b"""[model]
variant = "b1"
[data]
global_batch = 64
crop_scale = [0.08, 1.0]
[optim]
lr = 1e-3
epochs = 3
[run]
seed = 1
sync_bn = "group:2"
"""


# Weights


def _safetensors_seeds(folder: Path) -> list[bytes]:
    model = fat.FAT(_tiny())
    classes = fat.ClassList.of(["n01", "n02"], ["crane", None])
    info = fat.WeightsInfo(classes=classes, size=64, crop_pct=0.9, mean=(0.5, 0.4, 0.3), ema=True, top1=0.5, step=7)
    fat.save_weights(model, folder / "a.safetensors", info=info)
    return [(folder / "a.safetensors").read_bytes()]


def _tiny() -> fat.FATConfig:
    return fat.FATConfig(widths=(8, 8, 16, 16), depths=(1, 1, 1, 1), heads=(1, 1, 2, 2), num_classes=2)


def _parse_safetensors(content: bytes, folder: Path) -> None:
    (folder / "a.safetensors").write_bytes(content)
    fat.load_model(folder / "a.safetensors")


def _pth_seeds(folder: Path) -> list[bytes]:
    torch.save(
        {"model": {"w": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(3).half()}, "epoch": 3}, folder / "a.pth"
    )
    return [(folder / "a.pth").read_bytes()]


def _parse_pth(content: bytes, folder: Path) -> None:
    (folder / "a.pth").write_bytes(content)
    fat.weights.load.read_weights(folder / "a.pth")


def _target(name: str, made: Any, seal: Callable[[Any], bytes] | None = None, *, tolerant: bool = False) -> Target:
    return Target(name=name, seeds=made.seeds, parse=made.parse, errors=(UserError,), seal=seal, tolerant=tolerant)


WEIGHTS_ERRORS = (ValueError, OSError)
TARGETS: tuple[Target, ...] = (
    _target("manifest", SetTarget(MANIFEST_NAME), _sealed),
    _target("manifest-beton", SetTarget(MANIFEST_NAME, format="both", beton=BetonOptions(mode="raw")), _sealed),
    _target("index", SetTarget("train.index.npy")),
    _target("beton-index", SetTarget("train.beton.index.npy", format="both", beton=BetonOptions(mode="raw"))),
    _target("beton", SetTarget("train.beton", format="ffcv", beton=BetonOptions(mode="raw"))),
    _target("tar", SourceTarget(_webdataset, "a.tar")),
    _target("ilsvrc-tar", SourceTarget(_ilsvrc, "ILSVRC2012_img_train.tar")),
    _target("devkit-gz", SourceTarget(_ilsvrc, "ILSVRC2012_devkit_t12.tar.gz")),
    _target("devkit-meta", SourceTarget(_devkit_folder, "ILSVRC2012_devkit_t12/data/meta.mat")),
    _target("kaggle-solution", SourceTarget(_kaggle, "LOC_val_solution.csv")),
    _target("synset-mapping", SourceTarget(_kaggle, "LOC_synset_mapping.txt")),
    _target("parquet", SourceTarget(_parquet, "train-0.parquet")),
    _target("class-list", FileTarget("classes.txt", lambda: b"ant An ant, Formica\nbee\tA bee\n", read_classes)),
    _target("conversion-plan", WorkTarget(), dumps),
    Target(
        name="image",
        seeds=_image_seeds,
        parse=lambda content, folder: accept(content, ImageRules()),
        errors=(Rejected,),
    ),
    _target("checkpoint", CheckpointTarget(), _sealed_meta),
    _target("recipe-toml", FileTarget("r.toml", lambda: RECIPE, lambda path: apply_file(Recipe(), path))),
    _target("recipe-json", FileTarget(RECIPE_NAME, _saved_run, lambda path: read_saved_run(path.parent)), dumps),
    _target("metrics", FileTarget(METRICS_NAME, _metrics, _read_metrics), tolerant=True),
    _target("report-metrics", ReportTarget(METRICS_NAME), _json_lines, tolerant=True),
    _target("report-status", ReportTarget(STATUS_NAME), _json_lines, tolerant=True),
    _target("class-names", FileTarget(CLASSES_NAME, lambda: CLASS_LIST.dumps().encode(), _read_class_names), dumps),
    _target("evaluation", FileTarget(RECORD_NAME, _evaluation, _read_evaluation)),
    _target(
        "status",
        FileTarget(
            STATUS_NAME, lambda: dumps({"status": "running", "step": 3, "reason": ""}), lambda p: read_status(p.parent)
        ),
        dumps,
        tolerant=True,
    ),
    _target(
        "heartbeat",
        FileTarget("rank-0", _beat, lambda path: heartbeat.read_beat(path, "0123456789abcdef")),
        dumps,
        tolerant=True,
    ),
    Target(name="safetensors", seeds=_safetensors_seeds, parse=_parse_safetensors, errors=WEIGHTS_ERRORS),
    Target(name="torch-save", seeds=_pth_seeds, parse=_parse_pth, errors=WEIGHTS_ERRORS),
)

"""Which layout a source has, from its names alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from shards.errors import UserError
from shards.sources.classes import check_imagenet, order_classes, split_off_val
from shards.sources.folder import scan_folder
from shards.sources.ilsvrc import TRAIN_TAR, scan_ilsvrc
from shards.sources.kaggle import kaggle_root, scan_kaggle
from shards.sources.parquet import parquet_files, scan_parquet
from shards.sources.scan import TRAIN, Layout, Scan, ScanOptions
from shards.sources.webdataset import scan_webdataset, tar_files

EXPECTED = (
    "expected class folders (or train/ and val/ of them), ILSVRC2012_img_train.tar, the Kaggle layout (ILSVRC/), "
    "Parquet files, or WebDataset tars"
)


def scan(source: Path, options: ScanOptions, spool: Path) -> Scan:
    """List what a source holds, with its classes in order and its splits as asked for.

    Args:
        spool: folder for what must be unpacked before it can be shuffled (Parquet).

    Raises:
        UserError: there is nothing, or nothing usable, at `source`.
    """
    layout = options.layout or recognise(source)
    scanners: dict[Layout, Callable[[], Scan]] = {
        "folder": lambda: scan_folder(source),
        "ilsvrc": lambda: scan_ilsvrc(source),
        "kaggle": lambda: scan_kaggle(source),
        "parquet": lambda: scan_parquet(source, spool, options.workers),
        "webdataset": lambda: scan_webdataset(source),
    }
    found = scanners[layout]()
    for split, listing in found.splits.items():
        if not len(listing):
            raise UserError(f"{source}: no images in split '{split}'; fill it, or remove it")
    if options.classes is not None:
        found = order_classes(found, options.classes)
    found = split_off_val(found, options.val_fraction, options.seed)
    return replace(found, notes=found.notes + check_imagenet(found))


def recognise(source: Path) -> Layout:
    """The layout that `source` looks like.

    Raises:
        UserError: none of them.
    """
    if source.is_file():
        kind = FILES.get(source.suffix)
        if kind is None:
            raise UserError(f"{source}: a file of no known kind; {EXPECTED}")
        return "ilsvrc" if source.name == TRAIN_TAR else kind
    if not source.is_dir():
        raise UserError(f"{source}: no such file or folder")
    if next(source.iterdir(), None) is None:
        raise UserError(f"{source}: empty folder; {EXPECTED}")
    return next((layout for layout, looks_so in FOLDERS.items() if looks_so(source)), "folder")


def _has_class_folders(source: Path) -> bool:
    return (source / TRAIN).is_dir() and any(entry.is_dir() for entry in (source / TRAIN).iterdir())


FILES: dict[str, Layout] = {".tar": "webdataset", ".parquet": "parquet"}
FOLDERS: dict[Layout, Callable[[Path], object]] = {
    "ilsvrc": lambda source: (source / TRAIN_TAR).is_file(),
    "kaggle": kaggle_root,
    "folder": _has_class_folders,
    "parquet": parquet_files,
    "webdataset": tar_files,
}

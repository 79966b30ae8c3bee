"""Which layout a source has, from its names alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from shards.errors import UserError
from shards.sources.identity import Identity, digest_of_files, digest_of_listing, digest_of_samples, digests_of_files
from shards.sources.layouts.class_tars import are_class_tars, scan_class_tars
from shards.sources.layouts.folder import scan_folder
from shards.sources.layouts.ilsvrc import TRAIN_TAR, scan_ilsvrc
from shards.sources.layouts.kaggle import kaggle_root, scan_kaggle
from shards.sources.layouts.members import COMPRESSED_SUFFIXES
from shards.sources.layouts.parquet import parquet_files, scan_parquet
from shards.sources.layouts.webdataset import compressed_tars, list_samples, scan_webdataset, tar_files
from shards.sources.naming.class_warnings import class_order_notes, source_class_warnings
from shards.sources.naming.classes import imagenet_notes, order_classes, split_off_val
from shards.sources.naming.split_folders import find_split_folders
from shards.sources.scan import TRAIN, Layout, Scan, ScanOptions
from shards.sources.walk import cached_folder_listings, list_folder

EXPECTED = (
    "expected class folders (or train/ and val/ of them), ILSVRC2012_img_train.tar, the Kaggle layout (ILSVRC/), "
    "Parquet files, WebDataset tars, or one tar a class"
)
_LOOKED_AT = 16
"""Folders that are opened to tell class folders; a source may have a million."""


@cached_folder_listings()
def scan(source: Path, options: ScanOptions, spool: Path) -> Scan:
    """List what a source holds, with its classes in order and its splits as asked for.

    Args:
        spool: folder for what must be unpacked before it can be shuffled (Parquet).

    Raises:
        UserError: there is nothing, or nothing usable, at `source`.
    """
    layout = options.layout or detect_layout(source)
    if layout == "parquet":
        found = scan_parquet(source, spool, options.workers, options.classes)
        files = digests_of_files(parquet_files(source), source)
        found = replace(found, digest=digest_of_files(files), files=files)
    elif layout == "webdataset":
        found = scan_webdataset(source, options.classes)
    else:
        found = _SCANNERS[layout](source)
    digest = found.digest or digest_of_listing(found)
    for split, listing in found.splits.items():
        if not len(listing):
            raise UserError(f"{source}: no images in split '{split}'; fill it, or remove it")
    found = _check_training(source, found, options)
    if options.classes is not None:
        found = order_classes(found, options.classes)
    found = split_off_val(found, options.val_fraction, options.seed)
    return replace(
        found,
        notes=found.notes + class_order_notes(found) + imagenet_notes(found),
        warnings=found.warnings + source_class_warnings(found),
        digest=digest,
    )


@cached_folder_listings()
def current_identity(source: Path, layout: Layout) -> Identity:
    """Return what tells the source from others now, as a scan would; nothing is unpacked.

    Raises:
        UserError: the source cannot be listed.
    """
    if layout == "parquet":
        files = digests_of_files(parquet_files(source), source)
        return Identity(digest_of_files(files), files=files)
    if layout == "webdataset":
        splits = list_samples(source).splits
        return Identity(digest_of_samples(splits), splits)
    found = _SCANNERS[layout](source)
    return Identity(digest_of_listing(found), found.splits)


@cached_folder_listings()
def detect_layout(source: Path) -> Layout:
    """The layout that `source` looks like.

    Raises:
        UserError: none of them.
    """
    if source.is_file():
        kind = "webdataset" if source.name.endswith(COMPRESSED_SUFFIXES) else FILES.get(source.suffix)
        if kind is None:
            raise UserError(f"{source}: a file of no known kind; {EXPECTED}")
        return "ilsvrc" if source.name == TRAIN_TAR else kind
    if not source.is_dir():
        raise UserError(f"{source}: no such file or folder")
    if not any(vars(list_folder(source)).values()):
        raise UserError(f"{source}: empty folder; {EXPECTED}")
    return next((layout for layout, looks_so in FOLDERS.items() if looks_so(source)), "folder")


def _has_class_folders(source: Path) -> bool:
    """Whether there are split folders around folders of images, or nothing but folders of images."""
    try:
        roots = find_split_folders(source).roots.values()
    except UserError:  # which the scanner of another layout need not say
        return False
    if any(root != source for root in roots):
        classes = (root / os.fsdecode(name) for root in roots for name in list_folder(root).folders[:_LOOKED_AT])
        return any(map(_holds_images, classes))
    contents = list_folder(source)
    folders = [source / os.fsdecode(name) for name in contents.folders[:_LOOKED_AT]]
    # A compressed tar beside class folders is what they were unpacked from.
    data = _UNCOMPRESSED if folders else _DATA
    return not any(name.lower().endswith(data) for name in contents.files) and all(map(_holds_images, folders))


def _lists_of_tars(source: Path) -> bool:
    """Whether the Parquet files are lists of what tars of the same names hold, as img2dataset writes them."""
    tars = {tar.with_suffix("") for tar in tar_files(source)}
    return bool(tars) and all(file.with_suffix("") in tars for file in parquet_files(source))


def _holds_images(folder: Path) -> bool:
    """Whether a folder, or one in it, holds images, and no tars or Parquet files."""
    contents = list_folder(folder)
    if any(name.lower().endswith(_DATA) for name in contents.files):
        return False
    below = (list_folder(folder / os.fsdecode(name)) for name in contents.folders[:_LOOKED_AT])
    return bool(contents.images) or any(inside.images for inside in below)


def _check_training(source: Path, found: Scan, options: ScanOptions) -> Scan:
    """Note a source that has no training images.

    Raises:
        UserError: it has several other splits, or is to be split.
    """
    if TRAIN in found.splits:
        return found
    splits = ", ".join(found.splits)
    if len(found.splits) > 1 or options.val_fraction:
        raise UserError(
            f"{source}: only {splits}, no split '{TRAIN}'; add a folder {TRAIN}/ (or files named so), or convert each "
            "split alone for evaluation"
        )
    return replace(found, notes=(*found.notes, f"{source}: only split '{splits}': a set for evaluation"))


_SCANNERS: dict[Layout, Callable[[Path], Scan]] = {
    "class-tars": scan_class_tars,
    "folder": scan_folder,
    "ilsvrc": scan_ilsvrc,
    "kaggle": scan_kaggle,
}
FILES: dict[str, Layout] = {".tar": "webdataset", ".parquet": "parquet"}
_UNCOMPRESSED = tuple(suffix.encode() for suffix in FILES)
_DATA = (*_UNCOMPRESSED, *(suffix.encode() for suffix in COMPRESSED_SUFFIXES))
FOLDERS: dict[Layout, Callable[[Path], object]] = {
    "ilsvrc": lambda source: (source / TRAIN_TAR).is_file(),
    "kaggle": kaggle_root,
    "folder": _has_class_folders,
    "parquet": lambda source: parquet_files(source) and not _lists_of_tars(source),
    "class-tars": lambda source: are_class_tars(tar_files(source)),
    "webdataset": lambda source: tar_files(source) or compressed_tars(source),
}

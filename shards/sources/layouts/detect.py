"""Detect the layout of a source from its file names, and scan it."""

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
    "Parquet files, WebDataset tars, or one tar per class"
)
_INSPECTED = 16
"""Number of folders that are inspected to detect class folders; a source may have a million folders."""


@cached_folder_listings()
def scan(source: Path, options: ScanOptions, spool: Path) -> Scan:
    """List the images of a source, with the class order and splits that the options specify.

    Args:
        spool: folder for images that must be unpacked before they can be shuffled (Parquet).

    Raises:
        UserError: the source does not exist or cannot be used.
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
            raise UserError(f"{source}: split '{split}' has no images; add images, or remove the split")
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
    """Return the identity of the source in its current state, equal to that of a scan; nothing is unpacked.

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
    """Return the layout of a source.

    Raises:
        UserError: the source has no known layout.
    """
    if source.is_file():
        kind = "webdataset" if source.name.endswith(COMPRESSED_SUFFIXES) else FILES.get(source.suffix)
        if kind is None:
            raise UserError(f"{source}: unknown file type; {EXPECTED}")
        return "ilsvrc" if source.name == TRAIN_TAR else kind
    if not source.is_dir():
        raise UserError(f"{source}: no such file or folder")
    if not any(vars(list_folder(source)).values()):
        raise UserError(f"{source}: the folder is empty; {EXPECTED}")
    return next((layout for layout, matches in LAYOUTS.items() if matches(source)), "folder")


def _has_class_folders(source: Path) -> bool:
    """Return whether a source has split folders that contain folders of images, or only folders of images."""
    try:
        roots = find_split_folders(source).roots.values()
    except UserError:  # the source may have another layout; if it has not, the scan reports the error
        return False
    if any(root != source for root in roots):
        classes = (root / os.fsdecode(name) for root in roots for name in list_folder(root).folders[:_INSPECTED])
        return any(map(_holds_images, classes))
    contents = list_folder(source)
    folders = [source / os.fsdecode(name) for name in contents.folders[:_INSPECTED]]
    # A compressed tar next to class folders is assumed to be their archive.
    data = _UNCOMPRESSED if folders else _DATA
    return not any(name.lower().endswith(data) for name in contents.files) and all(map(_holds_images, folders))


def _describe_tars(source: Path) -> bool:
    """Return whether the Parquet files describe tars of the same names, as written by img2dataset."""
    tars = {tar.with_suffix("") for tar in tar_files(source)}
    return bool(tars) and all(file.with_suffix("") in tars for file in parquet_files(source))


def _holds_images(folder: Path) -> bool:
    """Return whether a folder or its subfolders contain images, and the folder has no tars or Parquet files."""
    contents = list_folder(folder)
    if any(name.lower().endswith(_DATA) for name in contents.files):
        return False
    below = (list_folder(folder / os.fsdecode(name)) for name in contents.folders[:_INSPECTED])
    return bool(contents.images) or any(inside.images for inside in below)


def _check_training(source: Path, found: Scan, options: ScanOptions) -> Scan:
    """Add a note if a source has no training images.

    Raises:
        UserError: the source has no training images, and either several other splits or a `val_fraction`.
    """
    if TRAIN in found.splits:
        return found
    splits = ", ".join(found.splits)
    if len(found.splits) > 1 or options.val_fraction:
        raise UserError(
            f"{source}: has only the splits {splits}, but no split '{TRAIN}'; add a folder {TRAIN}/ (or files with "
            f"'{TRAIN}' in their names), or convert each split separately for evaluation"
        )
    note = f"{source}: has only split '{splits}', so the shard set is for evaluation only"
    return replace(found, notes=(*found.notes, note))


_SCANNERS: dict[Layout, Callable[[Path], Scan]] = {
    "class-tars": scan_class_tars,
    "folder": scan_folder,
    "ilsvrc": scan_ilsvrc,
    "kaggle": scan_kaggle,
}
FILES: dict[str, Layout] = {".tar": "webdataset", ".parquet": "parquet"}
_UNCOMPRESSED = tuple(suffix.encode() for suffix in FILES)
_DATA = (*_UNCOMPRESSED, *(suffix.encode() for suffix in COMPRESSED_SUFFIXES))
LAYOUTS: dict[Layout, Callable[[Path], object]] = {
    "ilsvrc": lambda source: (source / TRAIN_TAR).is_file(),
    "kaggle": kaggle_root,
    "folder": _has_class_folders,
    "parquet": lambda source: parquet_files(source) and not _describe_tars(source),
    "class-tars": lambda source: are_class_tars(tar_files(source)),
    "webdataset": lambda source: tar_files(source) or compressed_tars(source),
}

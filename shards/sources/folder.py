"""Class folders: SOURCE/train/CLASS/*, SOURCE/val/CLASS/*, or SOURCE/CLASS/* for a single split."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from shards.errors import UserError
from shards.images import looks_like_image
from shards.listing import ListingBuilder, printable
from shards.manifest import ClassEntry
from shards.sources.classes import human_names
from shards.sources.scan import TRAIN, VAL, Scan

VAL_FOLDERS = ("val", "valid", "validation")
IMAGE_SUFFIXES = frozenset(
    {b".jpg", b".jpeg", b".jpe", b".jfif", b".png", b".webp", b".bmp", b".gif", b".tif", b".tiff"}
)
_HIDDEN = b"."  # folders that tools leave behind, with copies and thumbnails in them
_APPLE_DOUBLE = b"._"  # resource forks that macOS leaves beside files, under the files' own suffixes


def scan_folder(source: Path) -> Scan:
    """List class folders.

    Raises:
        UserError: no such folder, no class folders, or a class folder without images.
    """
    found = scan_classes(split_folders(source))
    names = human_names(source)
    classes = tuple(replace(entry, name=names.get(entry.folder)) for entry in found.classes)
    return replace(found, classes=classes)


def scan_classes(roots: dict[str, Path]) -> Scan:
    """List the class folders of each split's root; classes are numbered in the order of their sorted names."""
    names = sorted({name for root in roots.values() for name in _class_folders(root)})
    labels = {name: label for label, name in enumerate(names)}
    builders = {split: ListingBuilder() for split in roots}
    ignored = 0
    for split, root in roots.items():
        for name in _class_folders(root):
            folder = root / os.fsdecode(name)
            images = 0
            for container, found, passed_over in _walk(bytes(folder), name):
                ignored += passed_over
                images += len(found)
                builders[split].add(
                    Path(os.fsdecode(container)), [(path, None, size, labels[name]) for path, size in found]
                )
            if images == 0:
                raise UserError(f"{folder}: a class folder without images; fill it or remove it")
    return Scan(
        layout="folder",
        classes=tuple(ClassEntry(folder=printable(name)) for name in names),
        splits={split: builder.build() for split, builder in builders.items()},
        ignored=ignored,
    )


def split_folders(source: Path) -> dict[str, Path]:
    """Split name -> folder of class folders."""
    roots = {TRAIN: source / TRAIN} if (source / TRAIN).is_dir() else {}
    for folder in VAL_FOLDERS:
        if (source / folder).is_dir():
            roots[VAL] = source / folder
    return roots or {TRAIN: source}


def _class_folders(root: Path) -> list[bytes]:
    """Names of the folders in `root`.

    Raises:
        UserError: there are none.
    """
    with os.scandir(bytes(root)) as entries:
        found = sorted(entry.name for entry in entries if not entry.name.startswith(_HIDDEN) and entry.is_dir())
    if not found:
        raise UserError(f"{root}: no class folders in it; images are expected as {root}/CLASS/IMAGE")
    return found


Found = tuple[bytes, list[tuple[bytes, int]], int]


def _walk(top: bytes, name: bytes) -> Iterator[Found]:
    """(folder, [(name of the image, size)], files passed over) of a class folder and all below it, in a fixed order.

    Links are followed, except those that lead back to a folder they stand in.
    """
    above = {_identity(os.fsencode(parent)) for parent in Path(os.fsdecode(os.path.realpath(top))).parents}
    pending = [(top, name, above)]
    while pending:
        folder, prefix, ancestors = pending.pop()
        identity = _identity(folder)
        if identity in ancestors:
            continue
        found, folders, passed_over = _list(folder, prefix)
        yield folder, found, passed_over
        pending += [(folder + b"/" + sub, prefix + b"/" + sub, ancestors | {identity}) for sub in reversed(folders)]


def _list(folder: bytes, prefix: bytes) -> tuple[list[tuple[bytes, int]], list[bytes], int]:
    found: list[tuple[bytes, int]] = []
    folders: list[bytes] = []
    passed_over = 0
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            try:
                status = entry.stat()
            except OSError:  # a link to nothing: listed where it claims to be an image, and rejected when read
                status = entry.stat(follow_symlinks=False)
            is_file = stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode)
            if stat.S_ISDIR(status.st_mode) and not entry.name.startswith(_HIDDEN):
                folders.append(entry.name)
            elif is_file and _is_image(entry):
                found.append((prefix + b"/" + entry.name, status.st_size))
            else:
                passed_over += 1
    return found, folders, passed_over


def named_as_image(name: bytes) -> bool:
    """Whether a file's name says that it is an image."""
    return not name.startswith(_APPLE_DOUBLE) and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _is_image(entry: os.DirEntry[bytes]) -> bool:
    """By name or, failing that, by content."""
    if named_as_image(entry.name):
        return True
    try:
        with open(entry.path, "rb") as file:
            return looks_like_image(file.read(16))
    except OSError:
        return False


def _identity(folder: bytes) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino

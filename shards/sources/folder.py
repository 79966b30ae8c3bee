"""Class folders: SOURCE/train/CLASS/*, SOURCE/val/CLASS/*, or SOURCE/CLASS/* for a single split."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import AnyStr

from shards.errors import UserError
from shards.formats import APPLE_DOUBLE, MAGIC_BYTES, looks_like_image, named_as_image
from shards.listing import Container, ListingBuilder, display_name
from shards.manifest import MAX_CLASSES, ClassEntry
from shards.regular import open_regular
from shards.sources.classes import first_duplicate, human_names
from shards.sources.scan import TRAIN, VAL, Scan
from shards.sources.unused import UnusedFiles

VAL_FOLDERS = ("val", "valid", "validation")
_HIDDEN = b"."  # folders that tools leave behind, with copies and thumbnails in them


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
    shown = [display_name(name) for name in names]
    twice = first_duplicate(shown)
    if twice is not None:
        raise UserError(f"{next(iter(roots.values()))}: two class folders that both read as '{twice}'; rename one")
    if len(names) > MAX_CLASSES:
        raise UserError(
            f"{next(iter(roots.values()))}: {len(names):,} class folders, more than the {MAX_CLASSES:,} classes that "
            "a set may have"
        )
    labels = {name: label for label, name in enumerate(names)}
    builders = {split: ListingBuilder() for split in roots}
    unused = UnusedFiles()
    for split, root in roots.items():
        for name in _class_folders(root):
            folder = root / os.fsdecode(name)
            images = 0
            for container, found, passed_over in _walk(bytes(folder), name):
                for path in passed_over:
                    unused.add("not an image", os.fsencode(split) + b"/" + path)
                images += len(found)
                builders[split].add_files(container, [(path, size, mtime, labels[name]) for path, size, mtime in found])
            if images == 0:
                raise UserError(f"{folder}: a class folder without images; fill it or remove it")
    return Scan(
        layout="folder",
        classes=tuple(ClassEntry(folder=name) for name in shown),
        splits={split: builder.build() for split, builder in builders.items()},
        unused=unused.entries(),
    )


def split_folders(source: Path) -> dict[str, Path]:
    """Split name -> folder of class folders.

    Raises:
        UserError: several folders could be the validation split.
    """
    roots = {TRAIN: source / TRAIN} if (source / TRAIN).is_dir() else {}
    val = [source / folder for folder in VAL_FOLDERS if (source / folder).is_dir()]
    if len(val) > 1:
        raise UserError(
            f"{source}: {len(val)} validation folders ({', '.join(folder.name for folder in val)}), expected one of "
            "them; move the others out of the source"
        )
    if val:
        roots[VAL] = val[0]
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


Images = list[tuple[bytes, int, int]]
"""Name, bytes and time of last change of each."""
Found = tuple[Container, Images, list[bytes]]


def _walk(top: bytes, name: bytes) -> Iterator[Found]:
    """Folder, images and names of other files of a class folder and of each one below it, in a fixed order.

    Links are followed, except those that lead back to a folder they stand in.
    """
    above = {_identity(os.fsencode(parent)) for parent in Path(os.fsdecode(os.path.realpath(top))).parents}
    pending = [(top, name, above)]
    while pending:
        folder, prefix, ancestors = pending.pop()
        identity = _identity(folder)
        if identity in ancestors:
            continue
        container = Container.of(Path(os.fsdecode(folder)))
        found, folders, passed_over = _list(folder, prefix)
        yield container, found, passed_over
        pending += [(folder + b"/" + sub, prefix + b"/" + sub, ancestors | {identity}) for sub in reversed(folders)]


def _list(folder: bytes, prefix: bytes) -> tuple[Images, list[bytes], list[bytes]]:
    found: Images = []
    folders: list[bytes] = []
    passed_over: list[bytes] = []
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            status = file_status(entry)
            if stat.S_ISDIR(status.st_mode) and not entry.name.startswith(_HIDDEN):
                folders.append(entry.name)
            elif _is_image(entry, status):
                found.append((prefix + b"/" + entry.name, status.st_size, int(status.st_mtime)))
            else:
                passed_over.append(prefix + b"/" + entry.name)
    return found, folders, passed_over


def file_status(entry: os.DirEntry[AnyStr]) -> os.stat_result:
    """Status of what the entry leads to; of a link to nothing or to itself, that of the link."""
    try:
        return entry.stat()
    except FileNotFoundError:
        return entry.stat(follow_symlinks=False)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return entry.stat(follow_symlinks=False)


def files_named(suffix: str, folders: Sequence[Path]) -> list[Path]:
    """The files of these folders, as far as there are such folders, whose names end so; sorted.

    Raises:
        OSError: a folder cannot be read, which `Path.glob` takes for an empty one.
    """
    found = []
    for folder in folders:
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
            found += [
                folder / entry.name
                for entry in entries
                if entry.name.endswith(suffix) and not entry.name.startswith(os.fsdecode(APPLE_DOUBLE))
            ]
    return sorted(found)


def _is_image(entry: os.DirEntry[bytes], status: os.stat_result) -> bool:
    """Whether it is a regular file, and an image by its name or, failing that, by its content.

    A link to nothing is one by its name, and rejected when it is read.
    """
    if stat.S_ISLNK(status.st_mode) or (stat.S_ISREG(status.st_mode) and named_as_image(entry.name)):
        return named_as_image(entry.name)
    if not stat.S_ISREG(status.st_mode) or status.st_size < MAGIC_BYTES:
        return False
    handle = open_regular(entry.path)
    try:
        return looks_like_image(os.read(handle, MAGIC_BYTES))
    finally:
        os.close(handle)


def _identity(folder: bytes) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino

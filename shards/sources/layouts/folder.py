"""Layout folder: class folders SOURCE/SPLIT/CLASS/*, or SOURCE/CLASS/* for training images only."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import AnyStr

from shards.errors import UserError
from shards.files.regular import kind, open_regular
from shards.format.manifest_fields import ClassEntry
from shards.images.formats import MAGIC_BYTES, RAW_SUFFIXES, looks_like_image, named_as_image
from shards.redact import display_name
from shards.sources.listing import Container, ListingBuilder
from shards.sources.naming.classes import class_order, display_class_names, format_count, human_names, join_first
from shards.sources.naming.folder_level import describe_files, no_class_folders_error
from shards.sources.naming.folder_names import (
    find_annotation_images,
    find_nested_class_root,
    is_annotation_subfolder,
    reject_containers,
)
from shards.sources.naming.split_folders import find_split_folders
from shards.sources.naming.split_lists import find_split_lists, format_list_paths, lists_below, split_list_warnings
from shards.sources.naming.splits import similar_splits_in, splits_in
from shards.sources.scan import Scan
from shards.sources.unused import UnusedFiles, merge
from shards.sources.walk import METADATA, count_files, list_folder, skip_reason


def scan_folder(source: Path) -> Scan:
    """List the images of class folders.

    Raises:
        UserError: there is no such folder, it has no class folders, or a class folder has no images; see also
            `find_split_folders`.
    """
    folders = find_split_folders(source)
    reject_containers(folders.roots)
    found = scan_classes(folders.roots, source)
    names = human_names(source)
    lists = find_split_lists(source, folders.roots.values())
    # Splits of the folders below the source, including folders that are not used.
    named = {split for name in list_folder(source).folders for split in splits_in(os.fsdecode(name))}
    return replace(
        found,
        classes=tuple(replace(entry, name=names.get(entry.folder)) for entry in found.classes),
        unused=merge([folders.unused.entries(), found.unused]),
        notes=(*folders.notes, *found.notes),
        warnings=(*folders.warnings, *split_list_warnings(lists, named | folders.roots.keys()), *found.warnings),
    )


def scan_classes(roots: dict[str, Path], source: Path) -> Scan:
    """List the class folders of each split; labels follow the order of `class_order`.

    Args:
        roots: split -> the folder that contains its class folders.
        source: the only root, or a folder above all roots.
    """
    folders = {split: _class_folders(root) for split, root in roots.items()}
    names = class_order({name for some in folders.values() for name in some})
    shown = display_class_names(names, next(iter(roots.values())), "class folders")
    labels = {name: label for label, name in enumerate(names)}
    builders = {split: ListingBuilder() for split in roots}
    unused = UnusedFiles()
    empty: list[tuple[Path, str]] = []
    other_split: list[str] = []
    annotated: list[str] = []
    masks: list[str] = []
    for split, root in roots.items():
        below = os.fsencode("" if root == source else f"{root.relative_to(source)}/")
        for name in folders[split]:
            folder = root / os.fsdecode(name)
            images = 0
            others: list[bytes] = []
            for container, found, unused_entries in _walk(bytes(folder), name):
                for path, reason, what, count in unused_entries:
                    unused.add(reason, below + path, kind=what, count=count)
                others += [path for path, *_ in unused_entries]
                images += len(found)
                builders[split].add_files(container, [(path, size, mtime, labels[name]) for path, size, mtime in found])
                if found and _is_named_like_another_split(container.path, folder, split):
                    other_split.append(
                        f"{container.path}: {split} images ({len(found):,}) in a folder named like another split"
                    )
                if container.path != folder and is_annotation_subfolder(container.path.name):
                    what = f"{format_count(len(found), 'image')} used as images of the class" if found else "not used"
                    annotated.append(f"{container.path}: named like annotations, but in a class folder; {what}")
                annotations = find_annotation_images([path for path, *_ in found])
                if annotations:
                    example = display_name(os.path.basename(annotations[0]))
                    masks.append(
                        f"{container.path}: {format_count(len(annotations), 'image')} named like annotations of other "
                        f"images ({example})"
                    )
            if images == 0:
                empty.append((folder, describe_files(others)))
    if empty:
        more = f" (and {len(empty) - 1:,} more)" if len(empty) > 1 else ""
        folder, holds = empty[0]
        what = f", only {holds}" if holds else ""
        raise UserError(f"{folder}: the class folder has no images{what}{more}; {_remedy(folder)}")
    return Scan(
        layout="folder",
        classes=tuple(ClassEntry(folder=name) for name in shown),
        splits={split: builder.build() for split, builder in builders.items()},
        unused=unused.entries(),
        warnings=tuple(join_first(lines, 1) for lines in (other_split, annotated, masks) if lines),
    )


def _remedy(folder: Path) -> str:
    """Return the remedy for a class folder without images; split lists in the folder must be applied first."""
    root = folder.parent
    nested = find_nested_class_root(root, [os.fsdecode(name) for name in list_folder(root).folders])
    if nested is not None and nested != folder:
        return f"if the folders in {nested} are the classes, convert that folder"
    lists = lists_below(folder)
    if lists:
        return (
            f"it contains split lists ({format_list_paths(lists)}): sort the images into class folders in train/ and "
            "test/ as they specify, then move this folder out of the source"
        )
    return "add images, or move the folder out of the source if it is not a class"


def _is_named_like_another_split(inside: Path, folder: Path, split: str) -> bool:
    """Return whether a folder below a class folder is named like a split other than `split`."""
    parts = inside.relative_to(folder).parts
    return any(not (splits_in(part) | similar_splits_in(part)) <= {split} for part in parts)


def _class_folders(root: Path) -> list[bytes]:
    """Return the sorted names of the folders in `root`.

    Raises:
        UserError: there are none.
    """
    found = list_folder(root).folders
    if not found:
        raise no_class_folders_error(root)
    return found


Images = list[tuple[bytes, int, int]]
"""(name, bytes, modification time) of each image."""
UnusedEntries = list[tuple[bytes, str, str | None, int]]
"""(path below the root, reason, kind as in `UnusedFiles.add`, number of files) of each unused entry."""
Found = tuple[Container, Images, UnusedEntries]


def _walk(top: bytes, name: bytes) -> Iterator[Found]:
    """Yield (folder, images, unused entries) of a class folder and each folder below it, in a fixed order.

    Links are followed, except links to a parent folder.
    """
    above = {_identity(os.fsencode(parent)) for parent in Path(os.fsdecode(os.path.realpath(top))).parents}
    pending = [(top, name, above)]
    while pending:
        folder, prefix, ancestors = pending.pop()
        identity = _identity(folder)
        if identity in ancestors:
            yield (
                Container.of(Path(os.fsdecode(folder))),
                [],
                [(prefix, "link to a parent folder", "link", 1)],
            )
            continue
        container = Container.of(Path(os.fsdecode(folder)))
        found, folders, unused_entries = _list(folder, prefix)
        yield container, found, unused_entries
        pending += [(folder + b"/" + sub, prefix + b"/" + sub, ancestors | {identity}) for sub in reversed(folders)]


def _list(folder: bytes, prefix: bytes) -> tuple[Images, list[bytes], UnusedEntries]:
    found: Images = []
    folders: list[bytes] = []
    unused_entries: UnusedEntries = []
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            path = prefix + b"/" + entry.name
            reason = skip_reason(entry.name)
            if reason is not None:
                kind_of = os.fsdecode(entry.name) if reason == METADATA else None
                unused_entries.append((path, reason, kind_of, count_files(Path(os.fsdecode(entry.path)))))
                continue
            status = file_status(entry)
            if stat.S_ISDIR(status.st_mode):
                folders.append(entry.name)
            elif _is_image(entry, status):
                found.append((path, status.st_size, int(status.st_mtime)))
            else:
                is_file = stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode)
                unused_entries.append((path, "not an image" if is_file else kind(status.st_mode), None, 1))
    return found, folders, unused_entries


def file_status(entry: os.DirEntry[AnyStr]) -> os.stat_result:
    """Return the status of an entry, following links; for a broken or circular link, the status of the link."""
    try:
        return entry.stat()
    except FileNotFoundError:
        return entry.stat(follow_symlinks=False)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return entry.stat(follow_symlinks=False)


def _is_image(entry: os.DirEntry[bytes], status: os.stat_result) -> bool:
    """Return whether an entry is a regular file that is an image by its name or, failing that, by its content.

    A broken link is judged by its name, and rejected when it is read.
    """
    if os.path.splitext(entry.name)[1].lower() in RAW_SUFFIXES:  # camera raw files begin like a TIFF
        return False
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

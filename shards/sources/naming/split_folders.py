"""Where the class folders of each split stand in a source: train/ and val/ by whatever names, or the source itself."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from shards.errors import UserError
from shards.redact import display_name
from shards.sources.naming.classes import MAPPING_FILES
from shards.sources.naming.folder_level import FolderLevel, no_class_folders_error, some
from shards.sources.naming.splits import enclosing_folder_warnings, names_only_a_split, no_validation_note, splits_in
from shards.sources.scan import TEST, TRAIN, VAL
from shards.sources.unused import UnusedFiles
from shards.sources.walk import METADATA, FolderContents, count_files, list_folder

MAX_WRAPPERS = 4
"""Folders around the class folders, or around those of the splits, that are looked through."""
_UNLABELLED = "test images without labels"


@dataclass
class SplitFolders:
    """The folder of class folders of each split, and what else stands beside and above them."""

    roots: dict[str, Path] = field(default_factory=dict)
    """In the order training, validation, test."""
    unused: UnusedFiles = field(default_factory=UnusedFiles)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def find_split_folders(source: Path) -> SplitFolders:
    """Find the folder of class folders of each split; a source without split folders is one of training images.

    Names decide as in `splits.named_split`, above the class folders alone: a class may have any name. A single folder
    around the class folders, or around the split folders, is looked through.

    Raises:
        UserError: two folders for one split, a split without class folders, or folders of which the names do not tell
            whether they are splits or classes.
        OSError: a folder cannot be read.
    """
    found = SplitFolders()
    folder = source
    for _ in range(MAX_WRAPPERS + 1):
        level = FolderLevel.of(folder)
        contents = level.contents
        if level.is_of_splits():
            _add_roots(found, level, source)
            if not found.roots:
                raise UserError(
                    f"{folder}: only a test split without classes ({some(level.named)}); give the folder that holds "
                    f"{TRAIN}/CLASS/IMAGE as the source (beside it: {some(level.others)})"
                )
            return found
        inner = level.wrapper()
        if inner is None:
            _check_classes(found, level)
            _count_files(found, level.contents, folder, source)
            found.roots[TRAIN] = folder
            found.warnings += enclosing_folder_warnings(source) or enclosing_folder_warnings(folder)
            return found
        _count_beside(found, contents, [name for name in contents.folders if name != inner], folder, source)
        folder = folder / os.fsdecode(inner)
        found.notes.append(f"{folder}: read as the source, being the only folder of it that holds class folders")
    raise UserError(f"{source}: more than {MAX_WRAPPERS} folders around the class folders; give {folder}")


def _add_roots(found: SplitFolders, level: FolderLevel, source: Path) -> None:  # noqa: PLR0912
    contents = level.contents
    beside = level.others
    for split in (TRAIN, VAL, TEST):
        named = [name for name, of in level.named.items() if of == split]
        holding = [name for name in named if level.inside[name].folders or level.inside[name].images] or named
        if len(holding) > 1:
            raise UserError(
                f"{level.folder}: {len(holding)} folders for split '{split}' ({some(holding, len(holding))}), "
                "expected one of them; join them, or move the others out of the source"
            )
        beside += [name for name in named if name not in holding]
        for name in holding:
            root = _look_through(found, level.path(name), split)
            inside = list_folder(root)
            if inside.folders:
                found.roots[split] = root
            elif split == TEST:
                _leave_out_test(found, root, source)
            else:
                raise no_class_folders_error(root)
    if TRAIN not in found.roots:
        for name in level.others:
            if list_folder(level.path(name)).images:
                raise UserError(
                    f"{level.path(name)}: a class folder beside split folders ({some(level.named)}); put the class "
                    f"folders of training into {TRAIN}/"
                )
    elif TEST in found.roots and not set(list_folder(found.roots[TEST]).folders) & set(list_folder(found.roots[TRAIN]).folders):
        _leave_out_test(found, found.roots.pop(TEST), source)
    if TRAIN in found.roots and VAL in found.roots:
        _check_unsorted(found.roots[TRAIN], found.roots[VAL])
    if TEST in found.roots and VAL not in found.roots:
        found.notes.append(no_validation_note(f"{found.roots[TEST]}"))
    for root in found.roots.values():
        _count_files(found, list_folder(root), root, source)
    _count_beside(found, contents, beside, level.folder, source)


def _check_unsorted(train: Path, val: Path) -> None:
    """Refuse validation images in one folder that is no class: they are not sorted by class.

    Raises:
        UserError: they are.
    """
    names, known = list_folder(val).folders, list_folder(train).folders
    if len(names) == 1 and len(known) > 1 and names[0] not in known:
        raise UserError(
            f"{val / os.fsdecode(names[0])}: the only folder of split '{VAL}', and none of the classes of {TRAIN}/ "
            f"({some(known)}); put the images into a folder for each class (lists such as val_annotations.txt name "
            "their classes), or move the split out of the source"
        )


def _look_through(found: SplitFolders, root: Path, split: str) -> Path:
    """Follow train/train/ and the like, which archives unpack to.

    Raises:
        UserError: another split stands in it.
    """
    contents = list_folder(root)
    while len(contents.folders) == 1 and not contents.images:
        name = os.fsdecode(contents.folders[0])
        if not (splits_in(name) == {split} and (names_only_a_split(name) or name == root.name)):
            break
        root = root / name
        contents = list_folder(root)
        found.notes.append(f"{root}: read as split '{split}', being the only folder in one of that split")
    for folder in contents.folders:
        name = os.fsdecode(folder)
        if names_only_a_split(name):
            inside = list_folder(root / name)
            if inside.folders and not inside.images:
                raise UserError(
                    f"{root / name}: a split folder inside of split '{split}'; move it beside {root.name}/, or rename "
                    "it if it is a class"
                )
    return root


def _leave_out_test(found: SplitFolders, root: Path, source: Path) -> None:
    """Count a test split whose folders say no class: flat, or in one folder of any name."""
    below = _below(root, source)
    contents = list_folder(root)
    contents.add_to(found.unused, below, root)
    for name in contents.files:
        found.unused.add("not an image", below + name)
    for name in contents.folders:
        path = root / os.fsdecode(name)
        found.unused.add(_UNLABELLED, below + name, kind=os.fsdecode(name), count=count_files(path))
    if contents.images:
        found.unused.add(_UNLABELLED, below + contents.images[0], count=len(contents.images))
    found.warnings.append(f"{root}: not used: no folders of the training classes in it, so its images have no labels")


def _check_classes(found: SplitFolders, level: FolderLevel) -> None:
    """Look at class folders whose names tell a split.

    Raises:
        UserError: all of them do, or one that says nothing else; `train` alone is a thing too.
    """
    flat = [name for name in level.named if level.inside[name].images]
    sure = [name for name in level.named if level.surely_split(name)]
    if sure and not level.others:
        raise no_class_folders_error(level.path(min(sure, key=lambda name: (TRAIN, VAL, TEST).index(level.named[name]))))
    for name in sure:
        if os.fsdecode(name).lower() != TRAIN:
            raise UserError(
                f"{level.path(name)}: names split '{level.named[name]}' and holds no class folders, beside "
                f"{some(level.others)}; images are expected as {level.path(name)}/CLASS/IMAGE: move it out of the "
                f"source, or, if it is a class, put all class folders into {TRAIN}/"
            )
    found.warnings += [
        f"{level.path(name)}: taken for a class, not for split '{level.named[name]}', as it holds images and no folders"
        for name in flat
    ]


def _count_beside(found: SplitFolders, contents: FolderContents, beside: list[bytes], folder: Path, source: Path) -> None:
    """Count what stands beside the folders that are used."""
    below = _below(folder, source)
    for name in beside:
        count = count_files(folder / os.fsdecode(name))
        found.unused.add("folder beside those that are used", below + name, kind=os.fsdecode(name), count=count)
    if beside:
        found.warnings.append(f"{folder}: not used: folders {some(beside)}, beside those that are")
    _count_files(found, contents, folder, source)


def _count_files(found: SplitFolders, contents: FolderContents, folder: Path, source: Path) -> None:
    """Count what stands beside class folders, or above them."""
    below = _below(folder, source)
    contents.add_to(found.unused, below, folder)
    folders = [
        name for name, reason in contents.skipped if reason == METADATA and (folder / os.fsdecode(name)).is_dir()
    ]
    if folders:
        found.notes.append(f"{folder}: {METADATA}, not used: {some(folders)}")
    for name in contents.files:
        if os.fsdecode(name) not in MAPPING_FILES:
            found.unused.add("not an image", below + name)
    if contents.images:
        for name in contents.images:
            found.unused.add("image outside of any class folder", below + name)
        found.warnings.append(
            f"{folder}: not used: {len(contents.images):,} images outside of any class folder (such as "
            f"{display_name(contents.images[0])})"
        )


def _below(folder: Path, source: Path) -> bytes:
    """Path below the source, with '/' at its end; empty for the source."""
    return b"" if folder == source else os.fsencode(folder.relative_to(source)) + b"/"

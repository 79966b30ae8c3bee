"""Find the folder that contains the class folders of each split: train/, val/ and similar, or the source itself."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from shards.errors import UserError
from shards.redact import display_name
from shards.sources.naming.classes import MAPPING_FILES
from shards.sources.naming.folder_level import FolderLevel, first_names, no_class_folders_error
from shards.sources.naming.splits import enclosing_folder_warnings, names_only_a_split, no_validation_note, splits_in
from shards.sources.scan import TEST, TRAIN, VAL
from shards.sources.unused import UnusedFiles
from shards.sources.walk import METADATA, FolderContents, count_files, list_folder

MAX_WRAPPERS = 4
"""Maximum number of wrapper folders around the class folders or split folders."""
_UNLABELED = "test images without labels"


@dataclass
class SplitFolders:
    """The folder that contains the class folders of each split, and what was found next to and above these."""

    roots: dict[str, Path] = field(default_factory=dict)
    """Split -> folder, in the order training, validation, test."""
    unused: UnusedFiles = field(default_factory=UnusedFiles)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def find_split_folders(source: Path) -> SplitFolders:
    """Find the folder with the class folders of each split; without split folders, all images are for training.

    Folder names decide as in `splits.named_split`, but only above the class folders, because a class may have any name.
    A wrapper folder around the class folders or split folders is skipped.

    Raises:
        UserError: there are two folders for one split, a split without class folders, or folders whose names do not
            show whether they are splits or classes.
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
                    f"{folder}: has only a test split without classes ({first_names(level.named)}); convert the folder "
                    f"that contains {TRAIN}/CLASS/IMAGE (next to the test split: {first_names(level.others)})"
                )
            return found
        inner = level.wrapper()
        if inner is None:
            _check_classes(found, level)
            _count_files(found, level.contents, folder, source)
            found.roots[TRAIN] = folder
            found.warnings += enclosing_folder_warnings(source) or enclosing_folder_warnings(folder)
            return found
        _count_unused_folders(found, contents, [name for name in contents.folders if name != inner], folder, source)
        folder = folder / os.fsdecode(inner)
        found.notes.append(f"{folder}: read as the source, because only this folder contains class folders")
    raise UserError(f"{source}: more than {MAX_WRAPPERS} wrapper folders around the class folders; convert {folder}")


def _add_roots(found: SplitFolders, level: FolderLevel, source: Path) -> None:  # noqa: PLR0912
    contents = level.contents
    unused_folders = level.others
    for split in (TRAIN, VAL, TEST):
        named = [name for name, of in level.named.items() if of == split]
        used = [name for name in named if level.inside[name].folders or level.inside[name].images] or named
        if len(used) > 1:
            raise UserError(
                f"{level.folder}: {len(used)} folders for split '{split}' ({first_names(used, len(used))}), "
                "expected one; merge them, or move the others out of the source"
            )
        unused_folders += [name for name in named if name not in used]
        for name in used:
            root = _innermost_folder(found, level.path(name), split)
            inside = list_folder(root)
            if inside.folders:
                found.roots[split] = root
            elif split == TEST:
                _count_unlabeled_test(found, root, source)
            else:
                raise no_class_folders_error(root)
    if TRAIN not in found.roots:
        for name in level.others:
            if list_folder(level.path(name)).images:
                raise UserError(
                    f"{level.path(name)}: a class folder next to split folders ({first_names(level.named)}); move the "
                    f"class folders of the training images into {TRAIN}/"
                )
    elif TEST in found.roots and not _have_common_folders(found.roots[TEST], found.roots[TRAIN]):
        _count_unlabeled_test(found, found.roots.pop(TEST), source)
    if TRAIN in found.roots and VAL in found.roots:
        _check_unsorted(found.roots[TRAIN], found.roots[VAL])
    if TEST in found.roots and VAL not in found.roots:
        found.notes.append(no_validation_note(f"{found.roots[TEST]}"))
    for root in found.roots.values():
        _count_files(found, list_folder(root), root, source)
    _count_unused_folders(found, contents, unused_folders, level.folder, source)


def _have_common_folders(one: Path, other: Path) -> bool:
    return bool(set(list_folder(one).folders) & set(list_folder(other).folders))


def _check_unsorted(train: Path, val: Path) -> None:
    """Check that the validation images are sorted by class.

    Raises:
        UserError: they are in a single folder, which is not one of the classes.
    """
    names, known = list_folder(val).folders, list_folder(train).folders
    if len(names) == 1 and len(known) > 1 and names[0] not in known:
        raise UserError(
            f"{val / os.fsdecode(names[0])}: the only folder of split '{VAL}', but not one of the classes of {TRAIN}/ "
            f"({first_names(known)}); sort the images into class folders (a list such as val_annotations.txt contains "
            "their classes), or move the split out of the source"
        )


def _innermost_folder(found: SplitFolders, root: Path, split: str) -> Path:
    """Follow nested folders of the same split, such as train/train/, and return the innermost one.

    Raises:
        UserError: the folder contains a folder of another split.
    """
    contents = list_folder(root)
    while len(contents.folders) == 1 and not contents.images:
        name = os.fsdecode(contents.folders[0])
        if not (splits_in(name) == {split} and (names_only_a_split(name) or name == root.name)):
            break
        root = root / name
        contents = list_folder(root)
        found.notes.append(f"{root}: read as split '{split}', because it is the only folder in a folder of that split")
    for folder in contents.folders:
        name = os.fsdecode(folder)
        if names_only_a_split(name):
            inside = list_folder(root / name)
            if inside.folders and not inside.images:
                raise UserError(
                    f"{root / name}: a split folder inside split '{split}'; move it next to {root.name}/, or rename it "
                    "if it is a class"
                )
    return root


def _count_unlabeled_test(found: SplitFolders, root: Path, source: Path) -> None:
    """Count the images of a test split without class folders as unused."""
    below = _below(root, source)
    contents = list_folder(root)
    contents.add_to(found.unused, below, root)
    for name in contents.files:
        found.unused.add("not an image", below + name)
    for name in contents.folders:
        path = root / os.fsdecode(name)
        found.unused.add(_UNLABELED, below + name, kind=os.fsdecode(name), count=count_files(path))
    if contents.images:
        found.unused.add(_UNLABELED, below + contents.images[0], count=len(contents.images))
    found.warnings.append(f"{root}: not used, because its images have no labels: it has no folders of training classes")


def _check_classes(found: SplitFolders, level: FolderLevel) -> None:
    """Check class folders whose names contain a split, and add warnings about them.

    Raises:
        UserError: the names of all folders contain a split, or a name is only a split, other than `train`, which may
            be a class (the vehicle).
    """
    flat = [name for name in level.named if level.inside[name].images]
    certain = [name for name in level.named if level.is_certainly_split(name)]
    if certain and not level.others:
        first = min(certain, key=lambda name: (TRAIN, VAL, TEST).index(level.named[name]))
        raise no_class_folders_error(level.path(first))
    for name in certain:
        if os.fsdecode(name).lower() != TRAIN:
            raise UserError(
                f"{level.path(name)}: named like split '{level.named[name]}', but contains no class folders; expected "
                f"images as {level.path(name)}/CLASS/IMAGE: move it out of the source or, if it is a class like "
                f"{first_names(level.others)}, move all class folders into {TRAIN}/"
            )
    found.warnings += [
        f"{level.path(name)}: read as a class, not as split '{level.named[name]}', because it contains no folders"
        for name in flat
    ]


def _count_unused_folders(
    found: SplitFolders, contents: FolderContents, unused_folders: list[bytes], folder: Path, source: Path
) -> None:
    """Count the files in unused folders, and the files next to these folders."""
    below = _below(folder, source)
    for name in unused_folders:
        count = count_files(folder / os.fsdecode(name))
        found.unused.add("folder not used", below + name, kind=os.fsdecode(name), count=count)
    if unused_folders:
        found.warnings.append(f"{folder}: folders not used: {first_names(unused_folders)}")
    _count_files(found, contents, folder, source)


def _count_files(found: SplitFolders, contents: FolderContents, folder: Path, source: Path) -> None:
    """Count the files next to class folders, or above them."""
    below = _below(folder, source)
    contents.add_to(found.unused, below, folder)
    folders = [
        name for name, reason in contents.skipped if reason == METADATA and (folder / os.fsdecode(name)).is_dir()
    ]
    if folders:
        found.notes.append(f"{folder}: not used: {first_names(folders)} ({METADATA})")
    for name in contents.files:
        if os.fsdecode(name) not in MAPPING_FILES:
            found.unused.add("not an image", below + name)
    if contents.images:
        for name in contents.images:
            found.unused.add("image outside any class folder", below + name)
        found.warnings.append(
            f"{folder}: {len(contents.images):,} images outside any class folder are not used (such as "
            f"{display_name(contents.images[0])})"
        )


def _below(folder: Path, source: Path) -> bytes:
    """Return the path relative to the source, ending with '/'; empty for the source."""
    return b"" if folder == source else os.fsencode(folder.relative_to(source)) + b"/"

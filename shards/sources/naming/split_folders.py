"""Where the class folders of each split stand in a source: train/ and val/ by whatever names, or the source itself."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from shards.errors import UserError
from shards.redact import display_name
from shards.sources.naming.classes import MAPPING_FILES
from shards.sources.naming.splits import doubts_about_place, no_validation, says_only_split, splits_in, without_split
from shards.sources.scan import TEST, TRAIN, VAL
from shards.sources.unused import UnusedFiles
from shards.sources.walk import METADATA, Contents, count_files, look

MAX_WRAPPERS = 4
"""Folders around the class folders, or around those of the splits, that are looked through."""
_LOOKED_AT = 16
"""Folders that are opened to tell class folders from wrappers; a source may have a million."""
_SHOWN = 3
_UNLABELLED = "test images without labels"
_REMEDIES = {
    (".zip", ".gz", ".tgz", ".7z", ".rar", ".bz2", ".xz", ".zst"): "unpack archives first",
    (".arrow",): "save the data set as Parquet instead: Dataset.to_parquet",
}
"""Suffixes of what holds images in another form, and what to do."""


@dataclass
class SplitFolders:
    """The folder of class folders of each split, and what else stands beside and above them."""

    roots: dict[str, Path] = field(default_factory=dict)
    """In the order training, validation, test."""
    unused: UnusedFiles = field(default_factory=UnusedFiles)
    notes: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)


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
        level = _Level.of(folder)
        contents = level.contents
        if level.is_of_splits():
            _add_roots(found, level, source)
            if not found.roots:
                raise UserError(
                    f"{folder}: only a test split without classes ({_some(level.named)}); give the folder that holds "
                    f"{TRAIN}/CLASS/IMAGE as the source (beside it: {_some(level.others)})"
                )
            return found
        inner = level.wrapper()
        if inner is None:
            _check_classes(found, level)
            _count_files(found, level.contents, folder, source)
            found.roots[TRAIN] = folder
            found.doubts += doubts_about_place(source) or doubts_about_place(folder)
            return found
        _count_beside(found, contents, [name for name in contents.folders if name != inner], folder, source)
        folder = folder / os.fsdecode(inner)
        found.notes.append(f"{folder}: read as the source, being the only folder of it that holds class folders")
    raise UserError(f"{source}: more than {MAX_WRAPPERS} folders around the class folders; give {folder}")


@dataclass(frozen=True)
class _Level:
    """A folder that may hold split folders, class folders, or one more folder around them."""

    folder: Path
    contents: Contents
    named: dict[bytes, str]
    """Folder -> the split that its name tells."""
    inside: dict[bytes, Contents]
    """Of the named ones."""

    @classmethod
    def of(cls, folder: Path) -> _Level:
        contents = look(folder)
        named = {}
        for name in contents.folders:
            splits = splits_in(os.fsdecode(name))
            if len(splits) == 1:
                named[name] = splits.pop()
        return cls(folder, contents, named, {name: look(folder / os.fsdecode(name)) for name in named})

    @property
    def others(self) -> list[bytes]:
        return [name for name in self.contents.folders if name not in self.named]

    def is_of_splits(self) -> bool:
        """Whether the named folders are splits, which hold folders, and not classes, which hold images.

        Raises:
            UserError: a name says more than a split (train_station), and nothing tells which it is.
        """
        if len(self.contents.folders) == 1 and any(map(self._is_around_splits, self.named)):
            return False
        deep = [name for name in self.named if self.inside[name].folders]
        sure = [name for name in deep if self.surely_split(name)]
        several = self.others or len({self.named[name] for name in deep}) > 1
        if deep and not sure and several:
            beside = [name for name in self.contents.folders if name != deep[0]]
            raise UserError(
                f"{self.path(deep[0])}: holds folders, and may be a class or the {self.named[deep[0]]} split beside "
                f"{_some(beside)}; put all class folders into {TRAIN}/, or rename the split folder to "
                f"{self.named[deep[0]]}/"
            )
        return bool(deep)

    def _is_around_splits(self, name: bytes) -> bool:
        """Whether a named folder is one around split folders: a data set called 'test'."""
        below = [sub for sub in self.inside[name].folders if says_only_split(os.fsdecode(sub))]
        others = (sub for sub in below if splits_in(os.fsdecode(sub)) != {self.named[name]})
        return any(look(self.path(name) / os.fsdecode(sub)).folders for sub in others)

    def surely_split(self, name: bytes) -> bool:
        """Whether the name says a split alone, or stands beside its like of another split (pets_train, pets_val)."""
        text = os.fsdecode(name)
        return says_only_split(text) or any(
            split != self.named[name] and without_split(os.fsdecode(other)) == without_split(text)
            for other, split in self.named.items()
        )

    def wrapper(self) -> bytes | None:
        """The folder to look into instead of this one; None where this one's folders are classes.

        Raises:
            UserError: split folders inside of class folders.
        """
        folders = self.contents.folders[:_LOOKED_AT]
        inside = {name: look(self.folder / os.fsdecode(name)) for name in folders}
        if len(self.contents.folders) == 1:
            (only,) = folders
            return only if inside[only].folders and not inside[only].images else None
        around = {name: splits for name in folders if (splits := self._splits_below(name, inside[name]))}
        if not around:
            return None
        (first, split), *_ = around.items()
        with_images = [name for name, contents in inside.items() if contents.images]
        if len(around) > 1 or with_images or len(self.contents.folders) > _LOOKED_AT:
            raise UserError(
                f"{self.path(first)}: has a folder {display_name(split)} in it, as if it were around the split "
                f"folders, but stands beside {_some(name for name in self.contents.folders if name != first)}; "
                f"expected {TRAIN}/CLASS/IMAGE and {VAL}/CLASS/IMAGE: give one of them as the source, or put the "
                "class folders into the split folders"
            )
        return first

    def _splits_below(self, name: bytes, contents: Contents) -> bytes | None:
        """The first folder in a folder whose name says a split alone."""
        below = (sub for sub in contents.folders if says_only_split(os.fsdecode(sub)))
        return next(below, None) if not contents.images else None

    def path(self, name: bytes) -> Path:
        return self.folder / os.fsdecode(name)


def _add_roots(found: SplitFolders, level: _Level, source: Path) -> None:  # noqa: PLR0912
    contents = level.contents
    beside = level.others
    for split in (TRAIN, VAL, TEST):
        named = [name for name, of in level.named.items() if of == split]
        holding = [name for name in named if level.inside[name].folders or level.inside[name].images] or named
        if len(holding) > 1:
            raise UserError(
                f"{level.folder}: {len(holding)} folders for split '{split}' ({_some(holding, len(holding))}), "
                "expected one of them; join them, or move the others out of the source"
            )
        beside += [name for name in named if name not in holding]
        for name in holding:
            root = _look_through(found, level.path(name), split)
            inside = look(root)
            if inside.folders:
                found.roots[split] = root
            elif split == TEST:
                _leave_out_test(found, root, source)
            else:
                raise no_class_folders(root)
    if TRAIN not in found.roots:
        for name in level.others:
            if look(level.path(name)).images:
                raise UserError(
                    f"{level.path(name)}: a class folder beside split folders ({_some(level.named)}); put the class "
                    f"folders of training into {TRAIN}/"
                )
    elif TEST in found.roots and not set(look(found.roots[TEST]).folders) & set(look(found.roots[TRAIN]).folders):
        _leave_out_test(found, found.roots.pop(TEST), source)
    if TRAIN in found.roots and VAL in found.roots:
        _check_unsorted(found.roots[TRAIN], found.roots[VAL])
    if TEST in found.roots and VAL not in found.roots:
        found.notes.append(no_validation(f"{found.roots[TEST]}"))
    for root in found.roots.values():
        _count_files(found, look(root), root, source)
    _count_beside(found, contents, beside, level.folder, source)


def _check_unsorted(train: Path, val: Path) -> None:
    """Refuse validation images in one folder that is no class: they are not sorted by class.

    Raises:
        UserError: they are.
    """
    names, known = look(val).folders, look(train).folders
    if len(names) == 1 and len(known) > 1 and names[0] not in known:
        raise UserError(
            f"{val / os.fsdecode(names[0])}: the only folder of split '{VAL}', and none of the classes of {TRAIN}/ "
            f"({_some(known)}); put the images into a folder for each class (lists such as val_annotations.txt name "
            "their classes), or move the split out of the source"
        )


def _look_through(found: SplitFolders, root: Path, split: str) -> Path:
    """Follow train/train/ and the like, which archives unpack to.

    Raises:
        UserError: another split stands in it.
    """
    contents = look(root)
    while len(contents.folders) == 1 and not contents.images:
        name = os.fsdecode(contents.folders[0])
        if not (splits_in(name) == {split} and (says_only_split(name) or name == root.name)):
            break
        root = root / name
        contents = look(root)
        found.notes.append(f"{root}: read as split '{split}', being the only folder in one of that split")
    for folder in contents.folders:
        name = os.fsdecode(folder)
        if says_only_split(name):
            inside = look(root / name)
            if inside.folders and not inside.images:
                raise UserError(
                    f"{root / name}: a split folder inside of split '{split}'; move it beside {root.name}/, or rename "
                    "it if it is a class"
                )
    return root


def _leave_out_test(found: SplitFolders, root: Path, source: Path) -> None:
    """Count a test split whose folders say no class: flat, or in one folder of any name."""
    below = _below(root, source)
    contents = look(root)
    contents.add_to(found.unused, below, root)
    for name in contents.files:
        found.unused.add("not an image", below + name)
    for name in contents.folders:
        path = root / os.fsdecode(name)
        found.unused.add(_UNLABELLED, below + name, kind=os.fsdecode(name), count=count_files(path))
    if contents.images:
        found.unused.add(_UNLABELLED, below + contents.images[0], count=len(contents.images))
    found.doubts.append(f"{root}: not used: no folders of the training classes in it, so its images have no labels")


def _check_classes(found: SplitFolders, level: _Level) -> None:
    """Look at class folders whose names tell a split.

    Raises:
        UserError: all of them do, or one that says nothing else; `train` alone is a thing too.
    """
    flat = [name for name in level.named if level.inside[name].images]
    sure = [name for name in level.named if level.surely_split(name)]
    if sure and not level.others:
        raise no_class_folders(level.path(min(sure, key=lambda name: (TRAIN, VAL, TEST).index(level.named[name]))))
    for name in sure:
        if os.fsdecode(name).lower() != TRAIN:
            raise UserError(
                f"{level.path(name)}: names split '{level.named[name]}' and holds no class folders, beside "
                f"{_some(level.others)}; images are expected as {level.path(name)}/CLASS/IMAGE: move it out of the "
                f"source, or, if it is a class, put all class folders into {TRAIN}/"
            )
    found.doubts += [
        f"{level.path(name)}: taken for a class, not for split '{level.named[name]}', as it holds images and no folders"
        for name in flat
    ]


def _count_beside(found: SplitFolders, contents: Contents, beside: list[bytes], folder: Path, source: Path) -> None:
    """Count what stands beside the folders that are used."""
    below = _below(folder, source)
    for name in beside:
        count = count_files(folder / os.fsdecode(name))
        found.unused.add("folder beside those that are used", below + name, kind=os.fsdecode(name), count=count)
    if beside:
        found.doubts.append(f"{folder}: not used: folders {_some(beside)}, beside those that are")
    _count_files(found, contents, folder, source)


def _count_files(found: SplitFolders, contents: Contents, folder: Path, source: Path) -> None:
    """Count what stands beside class folders, or above them."""
    below = _below(folder, source)
    contents.add_to(found.unused, below, folder)
    folders = [
        name for name, reason in contents.skipped if reason == METADATA and (folder / os.fsdecode(name)).is_dir()
    ]
    if folders:
        found.notes.append(f"{folder}: {METADATA}, not used: {_some(folders)}")
    for name in contents.files:
        if os.fsdecode(name) not in MAPPING_FILES:
            found.unused.add("not an image", below + name)
    if contents.images:
        for name in contents.images:
            found.unused.add("image outside of any class folder", below + name)
        found.doubts.append(
            f"{folder}: not used: {len(contents.images):,} images outside of any class folder (such as "
            f"{display_name(contents.images[0])})"
        )


def no_class_folders(root: Path) -> UserError:
    """Return the error that a folder holds no class folders, with what it holds instead."""
    contents = look(root)
    holds = kinds_of([*contents.images, *contents.files])
    found = f" but {holds}" if holds else ""
    return UserError(f"{root}: no class folders in it{found}; images are expected as {root}/CLASS/IMAGE")


def kinds_of(names: Iterable[bytes]) -> str:
    """Describe files by the number of each suffix, with an example and what to do about archives; '' for none."""
    listed = list(names)
    suffixes = Counter(os.path.splitext(os.fsdecode(name))[1].lower() or "no suffix" for name in listed)
    if not suffixes:
        return ""
    kinds = ", ".join(
        f"{count:,} {display_name(os.fsencode(suffix))}" for suffix, count in suffixes.most_common(_SHOWN)
    )
    remedies = {remedy for suffix in suffixes for of, remedy in _REMEDIES.items() if suffix in of}
    advice = "".join(f" ({remedy})" for remedy in sorted(remedies))
    return f"{kinds} such as {display_name(os.path.basename(listed[0]))}{advice}"


def _below(folder: Path, source: Path) -> bytes:
    """Path below the source, with '/' at its end; empty for the source."""
    return b"" if folder == source else os.fsencode(folder.relative_to(source)) + b"/"


def _some(names: Iterable[bytes], shown: int = _SHOWN) -> str:
    """The first few of some names, and how many there are."""
    listed = [display_name(name) for name in names]
    more = f" and {len(listed) - shown:,} more" if len(listed) > shown else ""
    return ", ".join(listed[:shown]) + more

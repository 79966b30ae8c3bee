"""Decide whether the subfolders of a folder are splits, classes, or a wrapper folder around them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from shards.errors import UserError
from shards.redact import display_name
from shards.sources.naming.splits import names_only_a_split, non_split_words, splits_in
from shards.sources.scan import TRAIN, VAL
from shards.sources.walk import FolderContents, list_folder

_INSPECTED = 16
"""Number of subfolders that are inspected to distinguish class folders from wrapper folders; there may be a million."""
_SHOWN = 3
_REMEDIES = {
    (".zip", ".gz", ".tgz", ".7z", ".rar", ".bz2", ".xz", ".zst"): "unpack archives first",
    (".arrow",): "save the data set as Parquet instead: Dataset.to_parquet",
}
"""Suffixes of archives and data files that may contain images -> remedy."""


@dataclass(frozen=True)
class FolderLevel:
    """A folder that contains split folders, class folders, or a wrapper folder around them."""

    folder: Path
    contents: FolderContents
    named: dict[bytes, str]
    """Subfolder whose name contains a split -> that split."""
    inside: dict[bytes, FolderContents]
    """Subfolders in `named` -> their contents."""

    @classmethod
    def of(cls, folder: Path) -> FolderLevel:
        contents = list_folder(folder)
        named = {}
        for name in contents.folders:
            splits = splits_in(os.fsdecode(name))
            if len(splits) == 1:
                named[name] = splits.pop()
        return cls(folder, contents, named, {name: list_folder(folder / os.fsdecode(name)) for name in named})

    @property
    def others(self) -> list[bytes]:
        return [name for name in self.contents.folders if name not in self.named]

    def is_of_splits(self) -> bool:
        """Return whether the folders in `named` are splits, which contain folders, not classes, which contain images.

        Raises:
            UserError: a name contains a split and other words (train_station), so it may be a split or a class.
        """
        if len(self.contents.folders) == 1 and any(map(self._contains_splits, self.named)):
            return False
        deep = [name for name in self.named if self.inside[name].folders]
        certain = [name for name in deep if self.is_certainly_split(name)]
        several = self.others or len({self.named[name] for name in deep}) > 1
        if deep and not certain and several:
            siblings = [name for name in self.contents.folders if name != deep[0]]
            raise UserError(
                f"{self.path(deep[0])}: contains folders, so it may be a class or the {self.named[deep[0]]} split "
                f"next to {first_names(siblings)}; if it is a class, move all class folders into {TRAIN}/; if it is "
                f"the split, rename it to {self.named[deep[0]]}/"
            )
        return bool(deep)

    def _contains_splits(self, name: bytes) -> bool:
        """Return whether a folder in `named` contains split folders, so that it is a data set, not a split."""
        below = [sub for sub in self.inside[name].folders if names_only_a_split(os.fsdecode(sub))]
        others = (sub for sub in below if splits_in(os.fsdecode(sub)) != {self.named[name]})
        return any(list_folder(self.path(name) / os.fsdecode(sub)).folders for sub in others)

    def is_certainly_split(self, name: bytes) -> bool:
        """Return whether a name is only a split, or has a counterpart for another split (pets_train, pets_val)."""
        text = os.fsdecode(name)
        return names_only_a_split(text) or any(
            split != self.named[name] and non_split_words(os.fsdecode(other)) == non_split_words(text)
            for other, split in self.named.items()
        )

    def wrapper(self) -> bytes | None:
        """Return the wrapper folder to continue with; None if the subfolders are classes.

        Raises:
            UserError: there are split folders inside class folders.
        """
        folders = self.contents.folders[:_INSPECTED]
        inside = {name: list_folder(self.folder / os.fsdecode(name)) for name in folders}
        if len(self.contents.folders) == 1:
            (only,) = folders
            return only if inside[only].folders and not inside[only].images else None
        wrappers = {name: splits for name in folders if (splits := self._splits_below(name, inside[name]))}
        if not wrappers:
            return None
        (first, split), *_ = wrappers.items()
        with_images = [name for name, contents in inside.items() if contents.images]
        if len(wrappers) > 1 or with_images or len(self.contents.folders) > _INSPECTED:
            raise UserError(
                f"{self.path(first)}: contains a split folder {display_name(split)}, but is next to "
                f"{first_names(name for name in self.contents.folders if name != first)}; expected "
                f"{TRAIN}/CLASS/IMAGE and {VAL}/CLASS/IMAGE: convert only one of these folders, or "
                "move the class folders into the split folders"
            )
        return first

    def _splits_below(self, name: bytes, contents: FolderContents) -> bytes | None:
        """Return the first subfolder whose name is only a split."""
        below = (sub for sub in contents.folders if names_only_a_split(os.fsdecode(sub)))
        return next(below, None) if not contents.images else None

    def path(self, name: bytes) -> Path:
        return self.folder / os.fsdecode(name)


def no_class_folders_error(root: Path) -> UserError:
    """Return the error for a folder without class folders; it describes the files in the folder."""
    contents = list_folder(root)
    files = describe_files([*contents.images, *contents.files])
    found = f", only {files}" if files else ""
    return UserError(f"{root}: no class folders in it{found}; expected images as {root}/CLASS/IMAGE")


def describe_files(names: Iterable[bytes]) -> str:
    """Describe files: number per suffix, an example, and a remedy for archives. Return '' if there are no files."""
    listed = list(names)
    suffixes = Counter(os.path.splitext(os.fsdecode(name))[1].lower() or "no suffix" for name in listed)
    if not suffixes:
        return ""
    kinds = ", ".join(
        f"{count:,} {display_name(os.fsencode(suffix))}" for suffix, count in suffixes.most_common(_SHOWN)
    )
    remedies = {remedy for suffix in suffixes for of, remedy in _REMEDIES.items() if suffix in of}
    advice = "".join(f"; {remedy}" for remedy in sorted(remedies))
    return f"{kinds} (such as {display_name(os.path.basename(listed[0]))}{advice})"


def first_names(names: Iterable[bytes], shown: int = _SHOWN) -> str:
    """Return the first few names and the number of further names."""
    listed = [display_name(name) for name in names]
    more = f" and {len(listed) - shown:,} more" if len(listed) > shown else ""
    return ", ".join(listed[:shown]) + more

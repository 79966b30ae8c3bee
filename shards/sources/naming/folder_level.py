"""One folder of a source: whether the folders in it are splits, classes, or one more around these."""

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

_LOOKED_AT = 16
"""Folders that are opened to tell class folders from wrappers; a source may have a million."""
_SHOWN = 3
_REMEDIES = {
    (".zip", ".gz", ".tgz", ".7z", ".rar", ".bz2", ".xz", ".zst"): "unpack archives first",
    (".arrow",): "save the data set as Parquet instead: Dataset.to_parquet",
}
"""Suffixes of what holds images in another form, and what to do."""


@dataclass(frozen=True)
class FolderLevel:
    """A folder that may hold split folders, class folders, or one more folder around them."""

    folder: Path
    contents: FolderContents
    named: dict[bytes, str]
    """Folder -> the split that its name tells."""
    inside: dict[bytes, FolderContents]
    """Of the named ones."""

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
                f"{some(beside)}; put all class folders into {TRAIN}/, or rename the split folder to "
                f"{self.named[deep[0]]}/"
            )
        return bool(deep)

    def _is_around_splits(self, name: bytes) -> bool:
        """Whether a named folder is one around split folders: a data set called 'test'."""
        below = [sub for sub in self.inside[name].folders if names_only_a_split(os.fsdecode(sub))]
        others = (sub for sub in below if splits_in(os.fsdecode(sub)) != {self.named[name]})
        return any(list_folder(self.path(name) / os.fsdecode(sub)).folders for sub in others)

    def surely_split(self, name: bytes) -> bool:
        """Whether the name says a split alone, or stands beside its like of another split (pets_train, pets_val)."""
        text = os.fsdecode(name)
        return names_only_a_split(text) or any(
            split != self.named[name] and non_split_words(os.fsdecode(other)) == non_split_words(text)
            for other, split in self.named.items()
        )

    def wrapper(self) -> bytes | None:
        """The folder to look into instead of this one; None where this one's folders are classes.

        Raises:
            UserError: split folders inside of class folders.
        """
        folders = self.contents.folders[:_LOOKED_AT]
        inside = {name: list_folder(self.folder / os.fsdecode(name)) for name in folders}
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
                f"folders, but stands beside {some(name for name in self.contents.folders if name != first)}; "
                f"expected {TRAIN}/CLASS/IMAGE and {VAL}/CLASS/IMAGE: give one of them as the source, or put the "
                "class folders into the split folders"
            )
        return first

    def _splits_below(self, name: bytes, contents: FolderContents) -> bytes | None:
        """The first folder in a folder whose name says a split alone."""
        below = (sub for sub in contents.folders if names_only_a_split(os.fsdecode(sub)))
        return next(below, None) if not contents.images else None

    def path(self, name: bytes) -> Path:
        return self.folder / os.fsdecode(name)


def no_class_folders_error(root: Path) -> UserError:
    """Return the error that a folder holds no class folders, with what it holds instead."""
    contents = list_folder(root)
    holds = describe_files([*contents.images, *contents.files])
    found = f" but {holds}" if holds else ""
    return UserError(f"{root}: no class folders in it{found}; images are expected as {root}/CLASS/IMAGE")


def describe_files(names: Iterable[bytes]) -> str:
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


def some(names: Iterable[bytes], shown: int = _SHOWN) -> str:
    """Return the first few of some names, and how many more there are."""
    listed = [display_name(name) for name in names]
    more = f" and {len(listed) - shown:,} more" if len(listed) > shown else ""
    return ", ".join(listed[:shown]) + more

"""Warnings about the classes of a source, whatever its layout: what may well be a mistake, a line each."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from shards.format.manifest_fields import ClassEntry
from shards.sources.naming.classes import class_order, join_first, quoted
from shards.sources.naming.folder_names import class_name_warnings
from shards.sources.scan import TRAIN, VAL, Scan

BLANK_SHARE = 0.01
"""Of a split's images that may be nearly black or of a single colour before it is a warning."""
_FOLDERS = ("folder", "kaggle", "class-tars")
_ENDS = 3  # numbers named from either end of an order

Counts = NDArray[np.int64]
"""Images of each class, int64 [classes]."""


def count_labels(labels: NDArray[np.integer], classes: int) -> Counts:
    """Return how many of `labels` [samples] each of `classes` has."""
    return np.bincount(labels, minlength=classes).astype(np.int64)


def source_class_warnings(found: Scan) -> tuple[str, ...]:
    """Return the warnings about a source that was listed."""
    counts = {split: count_labels(listing.rows["label"], len(found.classes)) for split, listing in found.splits.items()}
    by_name = [*_gaps_in_folders(found.classes), *class_name_warnings(found.classes)] if found.layout in _FOLDERS else []
    return (*class_warnings(found.classes, counts), *by_name)


def class_warnings(classes: Sequence[ClassEntry], counts: Mapping[str, Counts]) -> tuple[str, ...]:
    """Return the warnings about classes and their images.

    Args:
        counts: split -> images of each class, int64 [classes].
    """
    present = np.any([each > 0 for each in counts.values()], axis=0)
    lines = []
    if not present.all():
        numbered = all(entry.folder == str(label) for label, entry in enumerate(classes))
        missing = np.flatnonzero(~present).tolist()
        shown = join_first(_ranges(missing)) if numbered else _names(classes, missing)
        what = "labels do not occur" if numbered else "classes have no images at all"
        lines.append(f"{len(missing):,} of {len(classes):,} {what}: {shown}")
    for split, images in counts.items():
        missing = np.flatnonzero(present & (images == 0)).tolist()
        if missing:
            have = "classes have" if len(missing) > 1 else "class has"
            lines.append(f"{len(missing):,} {have} no {_kind(split)} images: {_names(classes, missing)}")
    if len(classes) == 1:
        lines.append(
            f"one class only, {quoted(classes[0].folder)}: nothing to tell apart; expected a folder (or a label) for "
            "each class"
        )
    return (*lines, *_alike(classes))


def rejected_class_warnings(split: str, classes: Sequence[ClassEntry], listed: Counts, kept: Counts) -> list[str]:
    """Return a warning if all of a split's images of a class were rejected.

    Args:
        listed, kept: images of each class, int64 [classes], before and after the rejection.
    """
    lost = np.flatnonzero((listed > 0) & (kept == 0)).tolist()
    if not lost:
        return []
    plural = "classes" if len(lost) > 1 else "class"
    return [f"{len(lost):,} {plural} lost all {_kind(split)} images as rejects: {_names(classes, lost)}"]


def blank_image_warnings(split: str, blank: int, images: int) -> list[str]:
    """Return a warning if more than `BLANK_SHARE` of a split's images are nearly black or of one colour."""
    if blank <= BLANK_SHARE * images:
        return []
    return [f"{blank:,} of {images:,} {split} images are nearly black or of a single colour ({blank / images:.1%})"]


def class_order_notes(found: Scan) -> tuple[str, ...]:
    """Say which labels folders named by numbers got, where it is not the order of their names as text."""
    names = [entry.folder.encode() for entry in found.classes]
    if found.layout not in _FOLDERS or names == sorted(names) or names != class_order(names):
        return ()
    return (
        f"the {len(names):,} class folders are named by numbers, so their labels follow the numbers "
        f"({_ends(names)}), not the order of text ({_ends(sorted(names))}); --classes FILE gives another order",
    )


def _kind(split: str) -> str:
    return {TRAIN: "training", VAL: "validation"}.get(split, split)


def _gaps_in_folders(classes: Sequence[ClassEntry]) -> list[str]:
    """Numbers between those of folders named by numbers that few enough lack to look like a mistake."""
    if len(classes) < 2 or not all(entry.folder.isascii() and entry.folder.isdigit() for entry in classes):
        return []
    numbers = {int(entry.folder) for entry in classes}
    low, high = min(numbers), max(numbers)
    if not len(numbers) <= high - low < 2 * len(numbers):  # no gaps, or numbers that do not count anything
        return []
    missing = [number for number in range(low, high + 1) if number not in numbers]
    return [
        f"class folders are numbered {low} to {high}, without {join_first(_ranges(missing))}: labels are counted "
        "without gaps, so they differ from the folders' numbers"
    ]


def _alike(classes: Sequence[ClassEntry]) -> list[str]:
    """Groups of classes whose names differ in no more than case, spaces at their ends, or Unicode form."""
    groups: dict[str, list[str]] = {}
    for entry in classes:
        groups.setdefault(_plain(entry.folder), []).append(entry.folder)
    alike = [group for group in groups.values() if len(group) > 1]
    if not alike:
        return []
    ways = {way for group in alike for way in _differences(group)}
    shown = join_first(" and ".join(map(_visible, group)) for group in alike)
    return [f"classes whose names differ only by {' or '.join(sorted(ways))}: {shown}"]


def _plain(name: str, but: str | None = None) -> str:
    """Return the name without what a person may overlook.

    Args:
        but: key of `_OVERLOOKED` that is left as it is.
    """
    for what, change in _OVERLOOKED.items():
        if what != but:
            name = change(name)
    return name


def _differences(group: list[str]) -> list[str]:
    """Return what of `_OVERLOOKED` the names differ in."""
    return [what for what in _OVERLOOKED if len({_plain(name, but=what) for name in group}) > 1]


_OVERLOOKED: dict[str, Callable[[str], str]] = {
    "Unicode form": lambda name: unicodedata.normalize("NFC", name),
    "invisible characters": lambda name: "".join(c for c in name if unicodedata.category(c) != "Cf"),
    "spaces": lambda name: " ".join(name.split()),
    "case": str.casefold,
    "leading zeros": lambda name: str(int(name)) if name.isascii() and name.isdigit() else name,
}


def _visible(name: str) -> str:
    """Return a name that looks like another one with its characters told apart."""
    return quoted(name) if name.isascii() else ascii(name)


def _names(classes: Sequence[ClassEntry], labels: Iterable[int]) -> str:
    return join_first(quoted(classes[label].folder) for label in labels)


def _ranges(numbers: Sequence[int]) -> list[str]:
    """Ascending numbers as '3' and '5 to 9'."""
    steps = np.flatnonzero(np.diff(numbers) > 1) + 1
    runs = np.split(np.asarray(numbers), steps)
    return [str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]


def _ends(names: Sequence[bytes]) -> str:
    shown = [name.decode() for name in names]
    if len(shown) <= 2 * _ENDS:
        return ", ".join(shown)
    return ", ".join([*shown[: _ENDS + 1], "...", shown[-1]])

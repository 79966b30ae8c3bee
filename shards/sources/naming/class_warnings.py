"""Warnings about the classes of a source of any layout: likely mistakes, one line each."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from shards.format.manifest_fields import ClassEntry
from shards.sources.naming.classes import class_order, join_first, quoted
from shards.sources.naming.folder_names import class_name_warnings
from shards.sources.scan import TRAIN, VAL, Scan

MAX_BLANK_FRACTION = 0.01
"""Fraction of blank images (nearly black or of a single color) in a split above which a warning is given."""
_FOLDERS = ("folder", "kaggle", "class-tars")
_ENDS = 3  # how many folder names are shown from each end of a class order

Counts = NDArray[np.int64]
"""Number of images per class, int64 [classes]."""


def count_labels(labels: NDArray[np.integer], classes: int) -> Counts:
    """Return the number of occurrences of each class in `labels` [samples]."""
    return np.bincount(labels, minlength=classes).astype(np.int64)


def source_class_warnings(found: Scan) -> tuple[str, ...]:
    """Return the warnings about the classes of a scanned source."""
    counts = {split: count_labels(listing.rows["label"], len(found.classes)) for split, listing in found.splits.items()}
    lines = class_warnings(found.classes, counts)
    if found.layout in _FOLDERS:
        lines += (*_number_gap_warnings(found.classes), *class_name_warnings(found.classes))
    return lines


def class_warnings(classes: Sequence[ClassEntry], counts: Mapping[str, Counts]) -> tuple[str, ...]:
    """Return the warnings about classes and the numbers of their images.

    Args:
        counts: split -> number of images per class, int64 [classes].
    """
    present = np.any([each > 0 for each in counts.values()], axis=0)
    lines = []
    if not present.all():
        numbered = all(entry.folder == str(label) for label, entry in enumerate(classes))
        missing = np.flatnonzero(~present).tolist()
        shown = join_first(_ranges(missing)) if numbered else _names(classes, missing)
        what = "labels do not occur" if numbered else "classes have no images in any split"
        lines.append(f"{len(missing):,} of {len(classes):,} {what}: {shown}")
    for split, images in counts.items():
        missing = np.flatnonzero(present & (images == 0)).tolist()
        if missing:
            have = "classes have" if len(missing) > 1 else "class has"
            lines.append(f"{len(missing):,} {have} no {_adjective(split)} images: {_names(classes, missing)}")
    if len(classes) == 1:
        lines.append(
            f"only one class, {quoted(classes[0].folder)}: a classifier needs at least two; expected one folder (or "
            "label) per class"
        )
    return (*lines, *_similar_name_warnings(classes))


def rejected_class_warnings(split: str, classes: Sequence[ClassEntry], listed: Counts, kept: Counts) -> list[str]:
    """Return a warning if all of a split's images of a class were rejected.

    Args:
        listed, kept: number of images per class before and after rejection, int64 [classes].
    """
    lost = np.flatnonzero((listed > 0) & (kept == 0)).tolist()
    if not lost:
        return []
    plural = "classes" if len(lost) > 1 else "class"
    return [f"all {_adjective(split)} images of {len(lost):,} {plural} were rejected: {_names(classes, lost)}"]


def blank_image_warnings(split: str, blank: int, images: int) -> list[str]:
    """Return a warning if more than `MAX_BLANK_FRACTION` of a split's images are nearly black or of one color."""
    if blank <= MAX_BLANK_FRACTION * images:
        return []
    return [f"{blank:,} of {images:,} {split} images are nearly black or of a single color ({blank / images:.1%})"]


def class_order_notes(found: Scan) -> tuple[str, ...]:
    """Return a note on the order of class folders named by numbers, if it differs from the order as text."""
    names = [entry.folder.encode() for entry in found.classes]
    if found.layout not in _FOLDERS or names == sorted(names) or names != class_order(names):
        return ()
    return (
        f"the names of the {len(names):,} class folders are numbers, so the labels follow numeric order "
        f"({_ends(names)}), not text order ({_ends(sorted(names))}); --classes FILE defines another order",
    )


def _adjective(split: str) -> str:
    return {TRAIN: "training", VAL: "validation"}.get(split, split)


def _number_gap_warnings(classes: Sequence[ClassEntry]) -> list[str]:
    """Return a warning if the numbers that name the class folders have gaps that look like a mistake."""
    if len(classes) < 2 or not all(entry.folder.isascii() and entry.folder.isdigit() for entry in classes):
        return []
    numbers = {int(entry.folder) for entry in classes}
    low, high = min(numbers), max(numbers)
    if not len(numbers) <= high - low < 2 * len(numbers):  # no gaps, or too many gaps for class numbers
        return []
    missing = [number for number in range(low, high + 1) if number not in numbers]
    return [
        f"class folders are numbered {low} to {high}, without {join_first(_ranges(missing))}: labels have no gaps, so "
        "they differ from the folder numbers"
    ]


def _similar_name_warnings(classes: Sequence[ClassEntry]) -> list[str]:
    """Return a warning if names of classes differ only in case, spaces, or another key of `_NORMALIZERS`."""
    groups: dict[str, list[str]] = {}
    for entry in classes:
        groups.setdefault(_normalize(entry.folder), []).append(entry.folder)
    similar = [group for group in groups.values() if len(group) > 1]
    if not similar:
        return []
    ways = {way for group in similar for way in _differences(group)}
    shown = join_first(" and ".join(map(_visible, group)) for group in similar)
    return [f"names of classes differ only in {' or '.join(sorted(ways))}: {shown}"]


def _normalize(name: str, but: str | None = None) -> str:
    """Return a name without differences that are easily overlooked.

    Args:
        but: key of `_NORMALIZERS` that is not applied.
    """
    for what, change in _NORMALIZERS.items():
        if what != but:
            name = change(name)
    return name


def _differences(group: list[str]) -> list[str]:
    """Return the keys of `_NORMALIZERS` in which the names differ."""
    return [what for what in _NORMALIZERS if len({_normalize(name, but=what) for name in group}) > 1]


_NORMALIZERS: dict[str, Callable[[str], str]] = {
    "Unicode form": lambda name: unicodedata.normalize("NFC", name),
    "invisible characters": lambda name: "".join(c for c in name if unicodedata.category(c) != "Cf"),
    "spaces": lambda name: " ".join(name.split()),
    "case": str.casefold,
    "leading zeros": lambda name: str(int(name)) if name.isascii() and name.isdigit() else name,
}


def _visible(name: str) -> str:
    """Return a name with non-ASCII characters escaped, so that similar names can be distinguished."""
    return quoted(name) if name.isascii() else ascii(name)


def _names(classes: Sequence[ClassEntry], labels: Iterable[int]) -> str:
    return join_first(quoted(classes[label].folder) for label in labels)


def _ranges(numbers: Sequence[int]) -> list[str]:
    """Format ascending numbers as ranges, such as '3' and '5 to 9'."""
    steps = np.flatnonzero(np.diff(numbers) > 1) + 1
    runs = np.split(np.asarray(numbers), steps)
    return [str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]


def _ends(names: Sequence[bytes]) -> str:
    shown = [name.decode() for name in names]
    if len(shown) <= 2 * _ENDS:
        return ", ".join(shown)
    return ", ".join([*shown[: _ENDS + 1], "...", shown[-1]])

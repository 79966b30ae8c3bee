"""Order and names of classes, splitting off a validation split, and notes on ImageNet-1K's counts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from shards.errors import UserError
from shards.files.regular import read_list
from shards.format.manifest_fields import MAX_CLASSES, ClassEntry
from shards.redact import display_name, one_line
from shards.sources.listing import Listing
from shards.sources.scan import TRAIN, VAL, Scan

SYNSET = re.compile(r"n\d{8}")
IMAGENET_CLASSES = 1000
IMAGENET_IMAGES = {TRAIN: 1_281_167, VAL: 50_000}
MAX_SHOWN = 8
"""Number of names shown in a message; only the number of further names is shown."""
MAPPING_FILES = ("LOC_synset_mapping.txt", "synset_words.txt")


def read_classes(path: Path) -> list[ClassEntry]:
    """Read a file with one class per line: folder, white space, comma-separated names (only the first name is used).

    Raises:
        UserError: the file is missing, empty, or not text; it has more than `MAX_CLASSES` classes, or a folder twice.
        StorageFailed: it cannot be read.
    """
    lines = read_list(path, "a text file with one class per line").splitlines()
    entries = []
    for line in filter(None, map(str.strip, lines)):
        folder, _, names = line.partition(" ") if "\t" not in line else line.partition("\t")
        entries.append(ClassEntry(folder=one_line(folder), name=one_line(names.split(",")[0].strip()) or None))
    if not entries:
        raise UserError(f"{path}: contains no classes; expected one per line")
    if len(entries) > MAX_CLASSES:
        raise UserError(f"{path}: has {len(entries):,} classes; at most {MAX_CLASSES:,} are allowed")
    twice = first_duplicate(entry.folder for entry in entries)
    if twice is not None:
        raise UserError(f"{path}: contains class '{twice}' twice; remove one of the lines")
    return entries


def class_order(names: Iterable[bytes]) -> list[bytes]:
    """Sort class folders: numerically if all names are decimal numbers (0, 1, 2, ..., 10), else as bytes."""
    ordered = sorted(names)
    return sorted(ordered, key=int) if all(map(bytes.isdigit, ordered)) else ordered


def display_class_names(names: Sequence[bytes], location: Path, what: str) -> list[str]:
    """Return the names of class folders, or of class tars, as displayable text.

    Args:
        location: their folder, for messages.
        what: "class folders" or "class tars", for messages.

    Raises:
        UserError: two names have the same text, or there are more than `MAX_CLASSES`.
    """
    shown = [display_name(name) for name in names]
    twice = first_duplicate(shown)
    if twice is not None:
        raise UserError(f"{location}: two {what} have names that are displayed as '{twice}'; rename one")
    if len(names) > MAX_CLASSES:
        raise UserError(f"{location}: has {len(names):,} {what}; at most {MAX_CLASSES:,} classes are allowed")
    return shown


def first_duplicate(names: Iterable[str]) -> str | None:
    """Return the first name that occurs a second time; None if all are different."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def human_names(folder: Path) -> dict[str, str | None]:
    """Return class folder -> readable name from the mapping file of a source; empty if it has no such file."""
    for name in MAPPING_FILES:
        if (folder / name).exists():
            return {entry.folder: entry.name for entry in read_classes(folder / name)}
    return {}


def order_classes(found: Scan, path: Path) -> Scan:
    """Order and name the classes as in a file.

    Raises:
        UserError: the source has classes that are not in the file.
    """
    classes, new_labels = match_classes(found.classes, read_classes(path), path)
    for listing in found.splits.values():
        listing.rows["label"] = new_labels[listing.rows["label"]]
    return replace(found, classes=classes)


def match_classes(
    found: Sequence[ClassEntry], listed: Sequence[ClassEntry], path: Path
) -> tuple[tuple[ClassEntry, ...], NDArray[np.uint32]]:
    """Order and name the classes of a source as in the file `path`, matched by folder.

    Args:
        found: classes of the source.
        listed: classes of the file.
        path: the file, for messages.

    Returns:
        The classes, and the new label of each class in `found`.

    Raises:
        UserError: a class in `found` is not in `listed`.
    """
    labels = {entry.folder: label for label, entry in enumerate(listed)}
    unknown = [entry.folder for entry in found if entry.folder not in labels]
    if unknown:
        raise UserError(f"{path}: does not list class '{unknown[0]}' ({len(unknown)} missing classes); add it")
    names = {entry.folder: entry.name for entry in found}
    classes = tuple(ClassEntry(folder=entry.folder, name=entry.name or names.get(entry.folder)) for entry in listed)
    return classes, np.array([labels[entry.folder] for entry in found], dtype=np.uint32)


def split_off_val(found: Scan, fraction: float, seed: int) -> Scan:
    """Split off a fraction of every class for validation, selected by a hash of the image names.

    A class with at least two images keeps at least one in each split; a class with one image stays in training.

    Raises:
        UserError: the source has a validation split, the fraction is invalid, or every class has only one image.
    """
    if fraction == 0:
        return found
    check_fraction(fraction)
    if VAL in found.splits:
        raise UserError(f"--val-fraction {fraction:g}: the source already has a validation split; remove the option")
    listing = found.splits[TRAIN]
    draws = np.fromiter(
        (xxhash.xxh3_64_intdigest(b"val-fraction/" + listing.name(i), seed) for i in range(len(listing))),
        dtype=np.uint64,
        count=len(listing),
    )
    labels = listing.rows["label"].astype(np.int64)
    order = np.lexsort((draws, labels))
    sizes = np.bincount(labels, minlength=len(found.classes))
    rank = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    requested = np.round(sizes * fraction)
    taken = np.where(sizes > 1, requested.clip(1, np.maximum(sizes - 1, 1)), 0)
    chosen = np.zeros(len(order), dtype=bool)
    chosen[order] = rank < np.repeat(taken, sizes)
    if not chosen.any():
        raise UserError(
            f"--val-fraction {fraction:g}: no class has more than one image, so none can be used for validation; add "
            "images, or remove the option"
        )
    splits = {
        **found.splits,
        TRAIN: Listing(listing.rows[~chosen], listing.names, listing.containers),
        VAL: Listing(listing.rows[chosen], listing.names, listing.containers),
    }
    notes = _small_class_notes(found, fraction, taken - requested)
    return replace(found, splits=splits, notes=found.notes + notes)


def _small_class_notes(found: Scan, fraction: float, added: NDArray[np.float64]) -> tuple[str, ...]:
    """Return notes on classes that are too small for the fraction.

    Args:
        added: validation images in excess of the requested fraction, may be negative; float64 [classes].
    """
    folders = [entry.folder for entry in found.classes]
    sizes = np.bincount(found.splits[TRAIN].rows["label"], minlength=len(folders))
    facts = (
        (sizes == 1, "the only image stays in training"),
        ((sizes > 1) & (added > 0), "the fraction is less than an image, so one image is used for validation"),
        ((sizes > 1) & (added < 0), "the fraction leaves no image, so one image stays in training"),
    )
    return tuple(
        f"--val-fraction {fraction:g}: for {np.count_nonzero(which):,} of {len(folders):,} classes, {fact}: "
        f"{join_first(quoted(folders[label]) for label in np.flatnonzero(which))}"
        for which, fact in facts
        if which.any()
    )


def quoted(folder: str) -> str:
    """Return a class folder in quotes, so that leading and trailing spaces are visible; non-ASCII is unchanged."""
    return f"'{folder}'"


def format_count(number: int, what: str) -> str:
    """Return a number with a noun, in the plural unless the number is 1: "1,000 images"."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def join_first(texts: Iterable[str], most: int = MAX_SHOWN) -> str:
    """Join the first `most` texts with commas and append the number of further texts."""
    listed = list(texts)
    more = f" and {len(listed) - most:,} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def check_fraction(fraction: float) -> None:
    """Check the value of --val-fraction.

    Raises:
        UserError: it is not a number from 0 (inclusive) to 1 (exclusive).
    """
    if not 0 <= fraction < 1:
        raise UserError(f"--val-fraction {fraction:g}: expected a number from 0 to less than 1")


def imagenet_notes(found: Scan) -> tuple[str, ...]:
    """Return notes on differences from ImageNet-1K's counts, for a source that looks like ImageNet-1K."""
    folders = [entry.folder for entry in found.classes]
    if not all(map(SYNSET.fullmatch, folders)):
        return ()
    if found.layout not in ("ilsvrc", "kaggle") and len(folders) != IMAGENET_CLASSES:
        return ()
    notes = []
    if len(folders) != IMAGENET_CLASSES:
        notes.append(f"ImageNet-1K has {IMAGENET_CLASSES:,} classes, but this source has {len(folders):,}")
    for split, listing in found.splits.items():
        expected = IMAGENET_IMAGES.get(split)
        if expected is not None and len(listing) != expected:
            notes.append(f"ImageNet-1K has {expected:,} {split} images, but this source has {len(listing):,}")
    return tuple(notes)

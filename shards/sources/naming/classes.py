"""Classes and splits, as every source has them: order, names, ImageNet's counts, a validation split where none is."""

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
SHOWN = 8
"""Classes that a message names; of the others it says how many there are."""
MAPPING_FILES = ("LOC_synset_mapping.txt", "synset_words.txt")


def read_classes(path: Path) -> list[ClassEntry]:
    """Read a file of one class a line: folder, white space, human names separated by commas (the first counts).

    Raises:
        UserError: missing, empty, not text, of more than `MAX_CLASSES`, or a folder named twice.
        StorageFailed: it cannot be read.
    """
    lines = read_list(path, "a text file with one class a line").splitlines()
    entries = []
    for line in filter(None, map(str.strip, lines)):
        folder, _, names = line.partition(" ") if "\t" not in line else line.partition("\t")
        entries.append(ClassEntry(folder=one_line(folder), name=one_line(names.split(",")[0].strip()) or None))
    if not entries:
        raise UserError(f"{path}: no classes in it; expected one a line")
    if len(entries) > MAX_CLASSES:
        raise UserError(f"{path}: {len(entries):,} classes, more than the {MAX_CLASSES:,} that a set may have")
    twice = first_duplicate(entry.folder for entry in entries)
    if twice is not None:
        raise UserError(f"{path}: class '{twice}' is named twice; remove one of the lines")
    return entries


def class_order(names: Iterable[bytes]) -> list[bytes]:
    """Sort class folders: by number where all names are decimal numbers (0, 1, 2, ..., 10), else as bytes."""
    ordered = sorted(names)
    return sorted(ordered, key=int) if all(map(bytes.isdigit, ordered)) else ordered


def display_class_names(names: Sequence[bytes], place: Path, what: str) -> list[str]:
    """Return the names of class folders, or of what stands for them, as text.

    Args:
        place: where they stand, for messages.
        what: they are, in the plural, for messages.

    Raises:
        UserError: two of them read alike, or there are more than `MAX_CLASSES`.
    """
    shown = [display_name(name) for name in names]
    twice = first_duplicate(shown)
    if twice is not None:
        raise UserError(f"{place}: two {what} that both read as '{twice}'; rename one")
    if len(names) > MAX_CLASSES:
        raise UserError(f"{place}: {len(names):,} {what}, more than the {MAX_CLASSES:,} classes that a set may have")
    return shown


def first_duplicate(names: Iterable[str]) -> str | None:
    """The first name that came before; None where all differ."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def human_names(folder: Path) -> dict[str, str | None]:
    """Class folder -> name, from the mapping file that a source brings along; empty where it brings none."""
    for name in MAPPING_FILES:
        if (folder / name).exists():
            return {entry.folder: entry.name for entry in read_classes(folder / name)}
    return {}


def order_classes(found: Scan, path: Path) -> Scan:
    """Give the classes the order, and the names, of a file.

    Raises:
        UserError: the source has classes that the file does not name.
    """
    classes, move = match_classes(found.classes, read_classes(path), path)
    for listing in found.splits.values():
        listing.rows["label"] = move[listing.rows["label"]]
    return replace(found, classes=classes)


def match_classes(
    found: Sequence[ClassEntry], wanted: Sequence[ClassEntry], path: Path
) -> tuple[tuple[ClassEntry, ...], NDArray[np.uint32]]:
    """Give the classes of a source the order, and the names, of the lines of `path`, matched by the folder.

    Returns:
        The classes, and the label that each of `found` gets.

    Raises:
        UserError: one of `found` is not among `wanted`.
    """
    places = {entry.folder: place for place, entry in enumerate(wanted)}
    unknown = [entry.folder for entry in found if entry.folder not in places]
    if unknown:
        raise UserError(f"{path}: does not name class '{unknown[0]}' ({len(unknown)} such in the source); add it")
    names = {entry.folder: entry.name for entry in found}
    classes = tuple(ClassEntry(folder=entry.folder, name=entry.name or names.get(entry.folder)) for entry in wanted)
    return classes, np.array([places[entry.folder] for entry in found], dtype=np.uint32)


def split_off_val(found: Scan, fraction: float, seed: int) -> Scan:
    """Take a share of every class for validation; which images is decided by a hash of their names.

    A class of two images or more keeps at least one on either side; a class of one image stays in training.

    Raises:
        UserError: the source has a validation split, the share is none, or all classes have one image.
    """
    if fraction == 0:
        return found
    check_fraction(fraction)
    if VAL in found.splits:
        raise UserError(f"--val-fraction {fraction:g}: the source has a validation split; leave the option out")
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
    asked = np.round(sizes * fraction)
    taken = np.where(sizes > 1, asked.clip(1, np.maximum(sizes - 1, 1)), 0)
    chosen = np.zeros(len(order), dtype=bool)
    chosen[order] = rank < np.repeat(taken, sizes)
    if not chosen.any():
        raise UserError(
            f"--val-fraction {fraction:g}: no class has more than one image, so none can be taken for validation; add "
            "images, or leave the option out"
        )
    splits = {
        **found.splits,
        TRAIN: Listing(listing.rows[~chosen], listing.names, listing.containers),
        VAL: Listing(listing.rows[chosen], listing.names, listing.containers),
    }
    return replace(found, splits=splits, notes=found.notes + _notes_on_small_classes(found, fraction, taken - asked))


def _notes_on_small_classes(found: Scan, fraction: float, added: NDArray[np.float64]) -> tuple[str, ...]:
    """Name the classes that are too small for the share.

    Args:
        added: images taken for validation beyond those that the share asks for; float64 [classes].
    """
    folders = [entry.folder for entry in found.classes]
    sizes = np.bincount(found.splits[TRAIN].rows["label"], minlength=len(folders))
    facts = (
        (sizes == 1, "a single image, which stays in training"),
        ((sizes > 1) & (added > 0), "too few images for that share, and one of them becomes validation"),
        ((sizes > 1) & (added < 0), "too few images for that share, and one of them stays in training"),
    )
    return tuple(
        f"--val-fraction {fraction:g}: {np.count_nonzero(which):,} of {len(folders):,} classes have {fact}: "
        f"{join_first(quoted(folders[label]) for label in np.flatnonzero(which))}"
        for which, fact in facts
        if which.any()
    )


def quoted(folder: str) -> str:
    """Return a class folder in quotes, which show spaces at its ends; what is not ASCII stays as it is."""
    return f"'{folder}'"


def format_count(number: int, what: str) -> str:
    """Return a number with what is counted, in the plural where it is not one: "1,000 images"."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def join_first(texts: Iterable[str], most: int = SHOWN) -> str:
    """Join texts by commas; beyond the first `most` of them, say how many more there are."""
    listed = list(texts)
    more = f" and {len(listed) - most:,} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def check_fraction(fraction: float) -> None:
    """Refuse a share of validation images that is none.

    Raises:
        UserError: it is not from 0 to 1, or 1, or not a number.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"--val-fraction {fraction:g}: a share between 0 and 1 is expected")


def imagenet_notes(found: Scan) -> tuple[str, ...]:
    """Notes on what a source that has ImageNet-1K's look lacks of it."""
    folders = [entry.folder for entry in found.classes]
    if not all(map(SYNSET.fullmatch, folders)):
        return ()
    if found.layout not in ("ilsvrc", "kaggle") and len(folders) != IMAGENET_CLASSES:
        return ()
    notes = []
    if len(folders) != IMAGENET_CLASSES:
        notes.append(f"ImageNet-1K has {IMAGENET_CLASSES:,} classes, this source {len(folders):,}")
    for split, listing in found.splits.items():
        expected = IMAGENET_IMAGES.get(split)
        if expected is not None and len(listing) != expected:
            notes.append(f"ImageNet-1K has {expected:,} {split} images, this source {len(listing):,}")
    return tuple(notes)

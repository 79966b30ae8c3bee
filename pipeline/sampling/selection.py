"""Select classes and a fraction of the training samples of a shard set, for quick trials.

The selection is a pure function of (shards, options, seed): it is the same on every machine and at every world size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.rng import Stream, bits
from pipeline.sampling.class_balance import shuffled_by_class
from shards.command import suggestion
from shards.errors import UserError, reason_of
from shards.format.dataset import ShardSet
from shards.format.manifest_fields import MAX_CLASSES, ClassEntry
from shards.redact import printable

OPTION = "--classes-subset"
MAX_FILE_BYTES = 1 << 26
TRAIN = "train"


def select(
    dataset: ShardSet, *, classes: int | Sequence[str] | None = None, fraction: float = 1.0, seed: int = 0
) -> ShardSet:
    """Reduce a set, in place, to some of its classes and a fraction of its training samples; return it.

    Labels are renumbered from 0, in the order of the set. Splits without samples of the classes are removed.

    Args:
        dataset: a set that was just opened.
        classes: folder names or names of the classes to keep, a list in any order; or a number N, the first N classes.
            None: all classes.
        fraction: above 0, up to 1. Each class keeps this fraction of its training samples, rounded, and at least one.
            The samples of a smaller fraction are among those of a larger one. Other splits stay complete.
        seed: chooses the samples of the fraction.

    Raises:
        UserError: a class is unknown or ambiguous, the training split has no samples of the classes, an argument is
            invalid, or the set was already reduced.
        ShardSetError, StorageFailed: an index is damaged or cannot be read.
    """
    if dataset.restricted:
        raise UserError(f"{dataset.path}: classes and samples were already selected; open the set again")
    if not 0 < fraction <= 1:
        raise UserError(f"fraction {fraction}: expected a number above 0, at most 1")
    if isinstance(classes, str | bool) or (isinstance(classes, Sequence) and not classes):
        raise UserError(f"classes {classes!r}: expected a list of class names, or a number of classes")
    entries = dataset.manifest.classes
    labels = np.arange(len(entries)) if classes is None else _labels_of(entries, classes, dataset.path)
    if len(labels) == len(entries) and fraction == 1:
        return dataset
    kept = np.zeros(len(entries), np.bool_)
    kept[labels] = True
    rows = {}
    for split in dataset.manifest.splits:
        of_split = dataset.index(split)["label"]
        ids = np.flatnonzero(kept[of_split])
        if split == TRAIN and fraction < 1:
            ids = ids[stratified(of_split[ids], fraction, ids=ids, seed=seed)]
        if len(ids):
            rows[split] = ids.astype(np.uint32)
        elif split == TRAIN:
            raise UserError(f"{dataset.path}: {OPTION}: the training split has no images of these classes")
    dataset.restrict(labels.tolist(), rows)
    return dataset


def stratified(labels: NDArray[np.integer], fraction: float, *, ids: NDArray[np.int64], seed: int) -> NDArray[np.bool_]:
    """Choose a fraction of the samples of each class by hashed keys.

    Args:
        labels: class number of each sample, integers [samples].
        fraction: above 0, up to 1.
        ids: sample ids, which the keys are computed from, int64 [samples].
        seed: seed of the run.

    Returns:
        bool [samples]: max(1, round(fraction x n)) samples of each class of n samples are True.
    """
    order = shuffled_by_class(labels, bits(Stream.FRACTION, seed, ids))
    sizes = np.bincount(labels)
    wanted = np.maximum(np.floor(fraction * sizes + 0.5).astype(np.int64), 1)
    place = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    chosen = np.zeros(len(labels), np.bool_)
    chosen[order] = place < np.repeat(wanted, sizes)
    return chosen


def parse_classes(text: str) -> int | tuple[str, ...]:
    """Parse the value of --classes-subset: a number, names separated by commas, or @FILE with one name per line.

    Raises:
        UserError: the file cannot be read, or there are no names.
    """
    if text.isascii() and text.isdigit():
        return int(text[:12])
    if text.startswith("@"):
        try:
            with Path(text[1:]).open("rb") as file:
                content = file.read(MAX_FILE_BYTES).decode()
        except (OSError, ValueError) as error:  # ValueError: the file is not UTF-8
            raise UserError(f"{OPTION} {printable(text)}: cannot be read ({reason_of(error)})") from error
        names = content.splitlines()
    else:
        names = text.split(",")
    found = tuple(name.strip() for name in names if name.strip())
    if not found:
        raise UserError(f"{OPTION} {printable(text)}: contains no class; expected a number, NAME,NAME,... or @FILE")
    return found


def _labels_of(entries: Sequence[ClassEntry], classes: int | Sequence[str], path: Path) -> NDArray[np.int64]:
    """Return the labels of classes, ascending. A folder name takes precedence over a human-readable name."""
    if isinstance(classes, int):
        if not 1 <= classes <= len(entries):
            raise UserError(
                f"{OPTION} {classes}: {path} has {len(entries):,} classes; expected a number from 1 to {len(entries)}, "
                "or names of classes"
            )
        return np.arange(classes)
    folders = {entry.folder: label for label, entry in enumerate(entries)}
    named = defaultdict(list)
    for label, entry in enumerate(entries):
        named[entry.name].append(label)
    labels = set()
    for name in classes[:MAX_CLASSES]:
        found = [folders[name]] if name in folders else named.get(name, [])
        if not found:
            near = suggestion(name, [*folders, *filter(None, named)])
            raise UserError(
                f"{OPTION}: {path} has no class {printable(name)!r}{near} (its {len(entries):,} classes begin with "
                f"{', '.join(printable(entry.folder) for entry in entries[:3])})"
            )
        if len(found) > 1:
            among = ", ".join(printable(entries[label].folder) for label in found)
            raise UserError(
                f"{OPTION}: {path} has {len(found)} classes named {printable(name)!r}; use their folder names: {among}"
            )
        labels.add(found[0])
    return np.array(sorted(labels))

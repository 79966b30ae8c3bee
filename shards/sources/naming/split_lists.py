"""Detect split lists next to class folders or archives: train.txt, test.csv, splits.json.

The lists are not read, because their formats differ between data sets. They cause a warning, because images that they
list may be used for the wrong split.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from shards.redact import one_line
from shards.sources.naming.classes import join_first
from shards.sources.naming.folder_names import is_annotation_container, is_image_container
from shards.sources.naming.splits import similar_splits_in, splits_in
from shards.sources.scan import TEST, TRAIN, VAL
from shards.sources.walk import list_folder

SUFFIXES = frozenset(
    (".csv", ".json", ".jsonl", ".list", ".lst", ".mat", ".npy", ".npz", ".pkl", ".tsv", ".txt", ".xlsx")
)
_DIVISIONS = frozenset(("fold", "folds", "partition", "partitions", "setid", "split", "splits"))
"""Words in the names of lists for several splits."""
_NO_LISTS = frozenset(
    (
        *("acc", "args", "config", "configs", "history", "license", "log", "logs", "loss", "losses", "metrics"),
        *("predictions", "readme", "report", "requirements", "results", "state", "stats", "submission"),
    )
)
"""Words in the names of files that are not split lists, such as output of training programs: test_results.json."""
_LIST_FOLDERS = frozenset(("imdb", "list", "lists", "meta", "metadata", "split", "splits"))
"""Names of folders for lists, next to a folder of class folders."""
_WORD = re.compile(r"[^\W\d_]+")
_MAX_FOLDERS = 64
"""Maximum number of folders that are searched for lists."""
_SHOWN = 3


def splits_of_list(name: str) -> set[str]:
    """Return the splits that a file of this name may list; an empty set if the file is not a split list.

    A list for several splits, such as splits.json, may list all three.
    """
    stem, suffix = os.path.splitext(name)
    if suffix.lower() not in SUFFIXES:
        return set()
    words = {word.lower() for word in _WORD.findall(stem)}
    if words & _NO_LISTS:
        return set()
    return splits_in(stem) | similar_splits_in(stem) or ({TRAIN, VAL, TEST} if words & _DIVISIONS else set())


def find_split_lists(source: Path, roots: Collection[Path]) -> list[Path]:
    """Find the split lists of a source of class folders: below it or, if the source is an images/ folder, around it.

    Args:
        roots: the folders that contain class folders.
    """
    here = Path(os.path.abspath(source))
    return lists_below(source, roots) or (_lists_around(here.parent) if is_image_container(here.name) else [])


def lists_below(folder: Path, roots: Collection[Path] = ()) -> list[Path]:
    """Find the split lists below a folder, except in the class folders in `roots`."""
    pending, found, seen = [folder], list[Path](), set[tuple[int, int]]()
    while pending and len(seen) < _MAX_FOLDERS:
        folder = pending.pop(0)
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            contents = list_folder(folder)
        except PermissionError:  # the scan reports the error if it reads this folder
            continue
        found += _lists_in(folder, contents.files)
        if folder not in roots:
            pending += [folder / os.fsdecode(name) for name in contents.folders]
    return found


def _lists_around(folder: Path) -> list[Path]:
    try:
        contents = list_folder(folder)
        found = _lists_in(folder, contents.files)
        for name in map(os.fsdecode, contents.folders):
            if name.lower() in _LIST_FOLDERS or is_annotation_container(name):
                found += _lists_in(folder / name, list_folder(folder / name).files)
    except PermissionError:  # a folder outside the source need not be readable
        return []
    return found


def _lists_in(folder: Path, files: Sequence[bytes]) -> list[Path]:
    return [folder / name for name in map(os.fsdecode, files) if splits_of_list(name)]


def split_list_warnings(lists: Sequence[Path], splits: Collection[str]) -> list[str]:
    """Return a warning if lists are for validation or test splits and the source has only a training split.

    Args:
        splits: splits of the source's folders or files, used or not.
    """
    other_splits = [path for path in lists if splits_of_list(path.name) - {TRAIN}]
    if not other_splits or set(splits) != {TRAIN}:
        return []
    look_like = (
        "look like split lists, which are not read"
        if len(other_splits) > 1
        else "looks like a split list, which is not read"
    )
    missing = sorted({split for path in other_splits for split in splits_of_list(path.name)} - {TRAIN})
    return [
        f"{format_list_paths(other_splits)}: {look_like}, so {' or '.join(missing)} images may be among the {TRAIN} "
        f"images; move the images into {TRAIN}/ and {TEST}/ as the lists specify, or move the lists out of the source"
    ]


def format_list_paths(lists: Sequence[Path]) -> str:
    """Return the first few paths of lists and the number of further lists."""
    return join_first((one_line(f"{path}") for path in lists), _SHOWN)

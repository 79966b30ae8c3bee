"""Lists beside class folders or archives that divide the images into splits: train.txt, test.csv, splits.json.

They are not read: formats differ from set to set. That they are there is a warning, as images of theirs may be in another
split than the one that they are used for.
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
"""Words of lists that divide images without naming a split."""
_NO_LISTS = frozenset(
    (
        *("acc", "args", "config", "configs", "history", "license", "log", "logs", "loss", "losses", "metrics"),
        *("predictions", "readme", "report", "requirements", "results", "state", "stats", "submission"),
    )
)
"""Words of files that a training program writes: test_results.json."""
_PLACES = frozenset(("imdb", "list", "lists", "meta", "metadata", "split", "splits"))
"""Folders beside a folder of class folders that are for lists."""
_WORD = re.compile(r"[^\W\d_]+")
_MAX_FOLDERS = 64
"""Folders that are opened to find lists; beside the class folders there may be any number."""
_SHOWN = 3


def splits_of_list(name: str) -> set[str]:
    """Return the splits that a file of this name lists; none if it is no such list.

    A list that names none of them, such as splits.json, may be of all three.
    """
    stem, suffix = os.path.splitext(name)
    if suffix.lower() not in SUFFIXES:
        return set()
    words = {word.lower() for word in _WORD.findall(stem)}
    if words & _NO_LISTS:
        return set()
    return splits_in(stem) | similar_splits_in(stem) or ({TRAIN, VAL, TEST} if words & _DIVISIONS else set())


def find_split_lists(source: Path, roots: Collection[Path]) -> list[Path]:
    """Find the lists of a source of class folders: those below it, or those around an images/ that is given alone.

    Args:
        roots: the folders of class folders.
    """
    here = Path(os.path.abspath(source))
    return lists_below(source, roots) or (_lists_around(here.parent) if is_image_container(here.name) else [])


def lists_below(folder: Path, roots: Collection[Path] = ()) -> list[Path]:
    """Find the lists below a folder, but not in the class folders in `roots`."""
    pending, found, seen = [folder], list[Path](), set[tuple[int, int]]()
    while pending and len(seen) < _MAX_FOLDERS:
        folder = pending.pop(0)
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            contents = list_folder(folder)
        except PermissionError:  # a folder that is used and cannot be read is refused by the scan
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
            if name.lower() in _PLACES or is_annotation_container(name):
                found += _lists_in(folder / name, list_folder(folder / name).files)
    except PermissionError:  # above the source, where nothing needs to be readable
        return []
    return found


def _lists_in(folder: Path, files: Sequence[bytes]) -> list[Path]:
    return [folder / name for name in map(os.fsdecode, files) if splits_of_list(name)]


def split_list_warnings(lists: Sequence[Path], splits: Collection[str]) -> list[str]:
    """Return a warning if lists name other splits than training, of which the source has none.

    Args:
        splits: those of the source's folders or files, used or not.
    """
    others = [path for path in lists if splits_of_list(path.name) - {TRAIN}]
    if not others or set(splits) != {TRAIN}:
        return []
    look_like = (
        "look like lists of splits, which are not read"
        if len(others) > 1
        else "looks like a list of splits, which is not read"
    )
    lack = sorted({split for path in others for split in splits_of_list(path.name)} - {TRAIN})
    return [
        f"{some_lists(others)}: {look_like}: {' or '.join(lack)} images may be among the {TRAIN} images; divide the "
        f"images by the lists into {TRAIN}/ and {TEST}/, or move the lists out of the source"
    ]


def some_lists(lists: Sequence[Path]) -> str:
    """Return the first few of some lists, and how many there are."""
    return join_first((one_line(f"{path}") for path in lists), _SHOWN)

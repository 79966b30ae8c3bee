"""The split that the name of a file or a folder tells: one rule for every layout."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from shards.errors import UserError
from shards.redact import one_line
from shards.sources.scan import TEST, TRAIN, VAL

SPLIT_WORDS = {
    TRAIN: ("train", "training", "trainval"),
    VAL: ("val", "valid", "validation", "dev", "eval", "holdout"),
    TEST: ("test", "testing"),
}
"""Split -> the words that name it, as whole words, in any case."""
_SPLIT_OF = {
    word + ending: split for split, words in SPLIT_WORDS.items() for word in words for ending in ("", "set", "data")
}
_FILLERS = frozenset(("data", "dataset", "dir", "folder", "images", "imgs", "set", "split"))
"""Words beside which a split's word still says no more than the split: train_images, val_set."""
_NEAR_WORDS = {
    TRAIN: ("trainings", "trn"),  # not 'trains': a class beside ships and planes
    VAL: ("evals", "evaluate", "evaluation", "evaluations", "heldout", "validate", "validations", "valids", "vals"),
    TEST: ("testings", "tests", "tst"),
}
_NEAR_SPLIT_OF = {word: split for split, words in _NEAR_WORDS.items() for word in words} | {
    word + ending: split
    for split, words in SPLIT_WORDS.items()
    for word in words
    for ending in ("dir", "files", "folder", "image", "images", "img", "imgs", "samples", "sets", "split")
}
"""Word -> the split that it is near, without being a word for it."""
# Letters of other scripts end a word ("train数据"); digits, '_' and every other character do too.
_WORD = re.compile(r"[A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u0300-\u036f\u1e00-\u1eff]+")
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_SHOWN = 3


def named_split(path: str) -> str | None:
    """Return the split (train, val or test) that a path below the source names; None where it names none.

    The part of the path nearest to the file decides: `test/train-0.tar` is of the training split.

    Args:
        path: folders and file name, separated by '/'.

    Raises:
        UserError: that part names two splits (`train_val-0.tar`).
    """
    for part in reversed(path.split("/")):
        found = splits_in(part)
        if len(found) > 1:
            raise UserError(
                f"{path}: '{part}' names several splits ({', '.join(sorted(found))}); rename it so that it names one"
            )
        if found:
            return found.pop()
    return None


def splits_in(name: str) -> set[str]:
    """Return the splits that one file or folder name tells."""
    return {_SPLIT_OF[word] for word in _words(name) if word in _SPLIT_OF}


def names_only_a_split(name: str) -> bool:
    """Return whether a name says a split and nothing else: `train`, `Val_Set`, `test2`, but not `train_station`."""
    return bool(splits_in(name)) and all(word in _SPLIT_OF or word in _FILLERS for word in _words(name))


def similar_splits_in(name: str) -> set[str]:
    """Return the splits that one file or folder name is near without telling one: `tests`, `pets_evaluation`."""
    return {_NEAR_SPLIT_OF[word] for word in _near_words(name) if word in _NEAR_SPLIT_OF}


def similar_split(name: str) -> str | None:
    """Return the split that a name is near, if it says nothing else: `Tests_2`, but not `evaluation_of_pets`."""
    near = similar_splits_in(name)
    alone = all(word in _NEAR_SPLIT_OF or word in _FILLERS for word in _near_words(name))
    return near.pop() if len(near) == 1 and alone else None


def non_split_words(name: str) -> tuple[str, ...]:
    """Return the words of a name that tell no split: the same for `pets_train` and `pets_val`."""
    return tuple(word for word in _words(name) if word not in _SPLIT_OF)


def _words(name: str) -> list[str]:
    """Words of a name in lower case. Camel case separates words where the whole is no word of a split."""
    found: list[str] = []
    for word in _WORD.findall(re.sub(r"(?i)hold[-_ ]out", "holdout", unicodedata.normalize("NFKC", name))):
        found += [word.lower()] if word.lower() in _SPLIT_OF else map(str.lower, _CAMEL.split(word))
    return found


def _near_words(name: str) -> list[str]:
    """Words of a name that tells no split; none of one that does."""
    return [] if splits_in(name) else _words(re.sub(r"(?i)held[-_ ]?out", "heldout", name))


@dataclass(frozen=True)
class FileSplits:
    """Files of a source, with the split of each."""

    splits: dict[Path, str]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    def all_notes(self, splits: Collection[str]) -> tuple[str, ...]:
        """Return the notes, given the splits of which samples were found."""
        if TEST not in splits or VAL in splits:
            return self.notes
        return (*self.notes, no_validation_note(f"{next(file for file, split in self.splits.items() if split == TEST)}"))


def assign_splits(files: Sequence[Path], source: Path, *, by_folder: bool = False) -> FileSplits:
    """Give each file the split that its path below the source names; training where it names none.

    Args:
        source: a folder above the files, or the only file.
        by_folder: look at the folders alone, because the files' names tell something else.

    Raises:
        UserError: a part of a path names two splits.
    """
    splits: dict[Path, str] = {}
    unnamed: list[str] = []
    near: dict[str, str] = {}
    places: dict[str, dict[str, None]] = {}
    for file in files:
        below = relative_to_source(file, source)
        looked_at = below.rpartition("/")[0] if by_folder else below
        named = named_split(looked_at)
        splits[file] = named or TRAIN
        if named is None:
            unnamed += [below] if file != source else []
            near |= {split: below for part in looked_at.split("/") for split in sorted(similar_splits_in(part))}
        else:
            places.setdefault(named, {})[_place(looked_at, named)] = None
    notes, warnings = [], []
    if not places:
        warnings += enclosing_folder_warnings(source)
    if unnamed:
        line = f"{_some(unnamed)}: no split named, so training"
        if TRAIN in places:
            warnings.append(f"{line}, beside {next(iter(places[TRAIN]))}, which is named so")
        elif near:
            split, name = next(iter(near.items()))
            warnings.append(
                f"{line}, though {one_line(name)} is near the name of split '{split}'; rename it if it is one"
            )
        else:
            notes.append(line)
    for split, several in places.items():
        if len(several) > 1:
            warnings.append(f"{_some(list(several))}: joined as split '{split}'")
    return FileSplits(splits, tuple(notes), tuple(warnings))


def enclosing_folder_warnings(source: Path) -> list[str]:
    """Return a warning if a source that names no split, so is of training, is or stands in a folder named as another."""
    absolute = Path(os.path.abspath(source))
    name = absolute.name if source.is_dir() else absolute.parent.name
    near = similar_split(name)
    splits = {near} if near else splits_in(name)
    if len(splits) != 1 or TRAIN in splits or not (near or names_only_a_split(name) or _words(name)[-1] in _SPLIT_OF):
        return []
    (split,) = splits
    renamed = f" it, renamed to {split}/" if near else f" {split}/"
    return [
        f"{source}: its images become split '{TRAIN}', though it {'is' if source.is_dir() else 'stands in'} a folder "
        f"named {one_line(name)}; to keep them as split '{split}', name the archives so ({split}-0.tar), or give a "
        f"folder that holds only{renamed} (a link will do)"
    ]


def relative_to_source(file: Path, source: Path) -> str:
    """Path of a file below its source, separated by '/'; the file's name where it is the source."""
    return file.name if file == source else file.relative_to(source).as_posix()


def no_validation_note(test: str) -> str:
    """Return the note on a source with a test split and no validation split.

    Args:
        test: the test split's folder or first file.
    """
    return (
        f"{test}: kept as split 'test'; there is no validation split, so nothing is evaluated while training "
        "(--val-fraction takes one from the training images, launch/evaluate.py --split test reads the test images)"
    )


def _place(path: str, split: str) -> str:
    """What names the split in a path: the folders down to the one that does, or those above the file and its word."""
    parts = path.split("/")
    last = max(i for i, part in enumerate(parts) if split in splits_in(part))
    if last < len(parts) - 1:
        return "/".join(parts[: last + 1])
    word = next(word for word in _words(parts[last]) if _SPLIT_OF.get(word) == split)
    return "/".join([*parts[:last], f"{word}*"])


def _some(names: Sequence[str]) -> str:
    """The first few of some names, and how many there are."""
    shown = ", ".join(map(one_line, names[:_SHOWN]))
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN:,} more"

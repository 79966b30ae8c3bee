"""Derive the split from the name of a file or folder; all layouts use the same rules."""

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
"""Split -> its names, as whole words in any case."""
_SPLIT_OF = {
    word + ending: split for split, words in SPLIT_WORDS.items() for word in words for ending in ("", "set", "data")
}
_FILLERS = frozenset(("data", "dataset", "dir", "folder", "images", "imgs", "set", "split"))
"""Words that add no meaning to the name of a split: train_images, val_set."""
_SIMILAR_WORDS = {
    TRAIN: ("trainings", "trn"),  # not 'trains', which may be a class, like 'ships' and 'planes'
    VAL: ("evals", "evaluate", "evaluation", "evaluations", "heldout", "validate", "validations", "valids", "vals"),
    TEST: ("testings", "tests", "tst"),
}
_SIMILAR_SPLIT_OF = {word: split for split, words in _SIMILAR_WORDS.items() for word in words} | {
    word + ending: split
    for split, words in SPLIT_WORDS.items()
    for word in words
    for ending in ("dir", "files", "folder", "image", "images", "img", "imgs", "samples", "sets", "split")
}
"""Word that resembles the name of a split -> that split."""
# Letters of other scripts end a word ("train数据"); digits, '_' and every other character do too.
_WORD = re.compile(r"[A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u0300-\u036f\u1e00-\u1eff]+")
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_SHOWN = 3


def named_split(path: str) -> str | None:
    """Return the split (train, val, or test) in a path; None if it contains none.

    The last part of the path with a split decides: `test/train-0.tar` belongs to the training split.

    Args:
        path: folders and file name relative to the source, separated by '/'.

    Raises:
        UserError: that part contains two splits (`train_val-0.tar`).
    """
    for part in reversed(path.split("/")):
        found = splits_in(part)
        if len(found) > 1:
            raise UserError(
                f"{path}: the name '{part}' contains several splits ({', '.join(sorted(found))}); rename it so that it "
                "contains one"
            )
        if found:
            return found.pop()
    return None


def splits_in(name: str) -> set[str]:
    """Return the splits in the name of one file or folder."""
    return {_SPLIT_OF[word] for word in _words(name) if word in _SPLIT_OF}


def names_only_a_split(name: str) -> bool:
    """Return whether a name means only a split: `train`, `Val_Set`, `test2`, but not `train_station`."""
    return bool(splits_in(name)) and all(word in _SPLIT_OF or word in _FILLERS for word in _words(name))


def similar_splits_in(name: str) -> set[str]:
    """Return the splits that a name resembles without containing one: `tests`, `pets_evaluation`."""
    return {_SIMILAR_SPLIT_OF[word] for word in _words_without_split(name) if word in _SIMILAR_SPLIT_OF}


def similar_split(name: str) -> str | None:
    """Return the split that a name resembles if it means nothing else: `Tests_2`, but not `evaluation_of_pets`."""
    similar = similar_splits_in(name)
    names_nothing_else = all(word in _SIMILAR_SPLIT_OF or word in _FILLERS for word in _words_without_split(name))
    return similar.pop() if len(similar) == 1 and names_nothing_else else None


def non_split_words(name: str) -> tuple[str, ...]:
    """Return the words of a name that are not splits, which are equal for `pets_train` and `pets_val`."""
    return tuple(word for word in _words(name) if word not in _SPLIT_OF)


def _words(name: str) -> list[str]:
    """Return the words of a name in lower case, split at camel case unless the word is the name of a split."""
    found: list[str] = []
    for word in _WORD.findall(re.sub(r"(?i)hold[-_ ]out", "holdout", unicodedata.normalize("NFKC", name))):
        found += [word.lower()] if word.lower() in _SPLIT_OF else map(str.lower, _CAMEL.split(word))
    return found


def _words_without_split(name: str) -> list[str]:
    """Return the words of a name that contains no split; an empty list if it contains one."""
    return [] if splits_in(name) else _words(re.sub(r"(?i)held[-_ ]?out", "heldout", name))


@dataclass(frozen=True)
class FileSplits:
    """Files of a source, with the split of each."""

    splits: dict[Path, str]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    def all_notes(self, splits: Collection[str]) -> tuple[str, ...]:
        """Return the notes, including those that depend on which splits have samples."""
        if TEST not in splits or VAL in splits:
            return self.notes
        first = next(file for file, split in self.splits.items() if split == TEST)
        return (*self.notes, no_validation_note(f"{first}"))


def assign_splits(files: Sequence[Path], source: Path, *, by_folder: bool = False) -> FileSplits:
    """Assign each file the split in its path relative to the source; training if there is none.

    Args:
        source: a folder above the files, or the only file.
        by_folder: use only the folders, because the file names have another meaning.

    Raises:
        UserError: a part of a path contains two splits.
    """
    splits: dict[Path, str] = {}
    unnamed: list[str] = []
    similar: dict[str, str] = {}
    sources_of_split: dict[str, dict[str, None]] = {}
    for file in files:
        below = relative_to_source(file, source)
        inspected = below.rpartition("/")[0] if by_folder else below
        named = named_split(inspected)
        splits[file] = named or TRAIN
        if named is None:
            unnamed += [below] if file != source else []
            similar |= {split: below for part in inspected.split("/") for split in sorted(similar_splits_in(part))}
        else:
            sources_of_split.setdefault(named, {})[_split_location(inspected, named)] = None
    notes, warnings = [], []
    if not sources_of_split:
        warnings += enclosing_folder_warnings(source)
    if unnamed:
        line = f"{_first_names(unnamed)}: no split in the name, so used for training"
        if TRAIN in sources_of_split:
            warnings.append(f"{line}, although {next(iter(sources_of_split[TRAIN]))} is named like split '{TRAIN}'")
        elif similar:
            split, name = next(iter(similar.items()))
            warnings.append(
                f"{line}, although {one_line(name)} resembles split '{split}'; rename it if it belongs to that split"
            )
        else:
            notes.append(line)
    for split, several in sources_of_split.items():
        if len(several) > 1:
            warnings.append(f"{_first_names(list(several))}: merged into split '{split}'")
    return FileSplits(splits, tuple(notes), tuple(warnings))


def enclosing_folder_warnings(source: Path) -> list[str]:
    """Return a warning if a source names no split, but is (or is in) a folder named like a validation or test split."""
    absolute = Path(os.path.abspath(source))
    name = absolute.name if source.is_dir() else absolute.parent.name
    similar = similar_split(name)
    splits = {similar} if similar else splits_in(name)
    if len(splits) != 1 or TRAIN in splits:
        return []
    if not (similar or names_only_a_split(name) or _words(name)[-1] in _SPLIT_OF):
        return []
    (split,) = splits
    renamed = f" it, renamed to {split}/" if similar else f" {split}/"
    return [
        f"{source}: its images are used for split '{TRAIN}', although it is {'' if source.is_dir() else 'in '}a folder "
        f"named {one_line(name)}; to use them for split '{split}', rename the archives ({split}-0.tar), or convert a "
        f"folder that contains only{renamed} (which may be a link)"
    ]


def relative_to_source(file: Path, source: Path) -> str:
    """Return the path of a file relative to the source, separated by '/'; the file name if it is the source."""
    return file.name if file == source else file.relative_to(source).as_posix()


def no_validation_note(test: str) -> str:
    """Return the note for a source with a test split but no validation split.

    Args:
        test: folder or first file of the test split.
    """
    return (
        f"{test}: kept as split 'test'; there is no validation split, so training does not evaluate the model "
        "(--val-fraction splits one off the training images; launch/evaluate.py --split test uses the test images)"
    )


def _split_location(path: str, split: str) -> str:
    """Return the part of a path that determines its split: a folder, or the path of the file up to its split word."""
    parts = path.split("/")
    last = max(i for i, part in enumerate(parts) if split in splits_in(part))
    if last < len(parts) - 1:
        return "/".join(parts[: last + 1])
    word = next(word for word in _words(parts[last]) if _SPLIT_OF.get(word) == split)
    return "/".join([*parts[:last], f"{word}*"])


def _first_names(names: Sequence[str]) -> str:
    """Return the first few names and the number of further names."""
    shown = ", ".join(map(one_line, names[:_SHOWN]))
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN:,} more"

"""Labels from outside: read, checked and numbered in one place, for tars and Parquet, for `pipeline shard` and `index`.

A label is a class number or the name of a class, and a source has one kind of them. Class numbers are the labels of the
set. Names are collected over all files and numbered in their sorted order, as those of class folders are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError
from shards.format.manifest_fields import MAX_CLASSES, ClassEntry
from shards.redact import one_line
from shards.schema import Count
from shards.sources.naming.classes import match_classes, read_classes

Label = int | str

MAX_DIGITS = 20
"""Digits of a class number that is written as text."""
MAX_LABEL = 256
"""Characters of a label that is text; longer ones are captions."""
SMALL_CLASSES = 1000
"""Classes that a set of any number of images may have."""
CLASSES_PER_IMAGE = 10
"""Above `SMALL_CLASSES`, a number of classes above this many times the images is taken for a mistake."""
_SHOWN = 60  # characters of a label in a message
_EXPECTED = "expected a class number, or the name of a class"
_NUMBER = re.compile(
    r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|[+-]?(nan|inf|infinity)", re.ASCII | re.IGNORECASE
)
_SEVERAL = re.compile(r"[+-]?[0-9.]+(\s*[\s,;|]\s*[+-]?[0-9.]+)+", re.ASCII)
_MISSING = ("", "None", "null", "<NA>")  # what Python, JSON and pandas write for no value


class NoLabelError(UserError):
    """An image is marked as having no label: None, NaN, an empty text or -1."""


@dataclass(frozen=True)
class FileLabels:
    """Labels of one file or of several, as a worker process returns them."""

    texts: list[str]
    """Names of classes, in the order in which they first occur; empty where the labels are class numbers."""
    first: str
    """Place of the first label, for messages; empty where there is none."""
    top: Count
    """Largest number: of a class, or of a place in `texts`."""
    top_at: str
    """Place of the largest class number, for messages."""


class LabelReader:
    """Reads the labels of one file or of several, and numbers those that are names of classes as they come."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}
        self._texts: list[str] = []
        self._first: tuple[str, Label] | None = None
        self._top = -1
        self._top_at = ""

    def read(self, value: object, shown: str) -> int:
        """Return the class number, or the place of the name of a class in `FileLabels.texts`.

        Args:
            shown: file, and row or member, for messages.

        Raises:
            NoLabelError, UserError: as `parse_label`; or it is of another kind than the labels before it.
        """
        label = parse_label(value, shown)
        if self._first is None:
            self._first = shown, label
        elif isinstance(label, str) != isinstance(self._first[1], str):
            raise _mixed(shown, label, *self._first)
        if isinstance(label, str):
            place = self._places.setdefault(label, len(self._texts))
            if place == MAX_CLASSES:
                raise UserError(f"{shown}: {_too_many_texts(place + 1)}")
            if place == len(self._texts):
                self._texts.append(label)
            label = place
        if label > self._top:
            self._top, self._top_at = label, shown
        return label

    def folder(self, number: int) -> str:
        """Return what stands for a class whose number `read` has given: its name, or the number."""
        return self._texts[number] if self._texts else str(number)

    def found(self) -> FileLabels:
        """Return what was read so far."""
        return FileLabels(self._texts, self._first[0] if self._first else "", max(0, self._top), self._top_at)


def parse_label(value: object, shown: str) -> Label:
    """Read one label.

    Args:
        value: an integer, a bool, a float or a decimal that is one, or text (or its bytes in UTF-8): a class number in
            decimal digits or as such a float, else the name of a class.
        shown: file, and row or member, for messages.

    Returns:
        A class number from 0 to `MAX_CLASSES` - 1, or the name of a class: of at most `MAX_LABEL` characters, without
        control characters.

    Raises:
        NoLabelError: it says that there is none: None, NaN, an empty text, -1.
        UserError: it is something else.
    """
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise UserError(f"{shown}: label {_short(value)} is not UTF-8 text; {_EXPECTED}") from None
    if isinstance(value, str):
        return _parse_text(value.strip(), shown)
    if value is None:
        raise _unlabeled(shown, value)
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Decimal):
        value = int(value) if value.is_finite() and value == int(value) else float(value)
    if isinstance(value, int | float):
        return _class_number(value, shown)
    raise UserError(f"{shown}: label {_short(value)} is of type {type(value).__name__}; {_EXPECTED}")


def _parse_text(text: str, shown: str) -> Label:
    if text in _MISSING:
        raise _unlabeled(shown, text)
    if len(text) > MAX_LABEL:
        raise UserError(f"{shown}: label {_short(text)} has more than {MAX_LABEL} characters: a caption; {_EXPECTED}")
    if text.isascii() and text.isdigit():
        if len(text) > MAX_DIGITS:
            raise UserError(f"{shown}: label {_short(text)} is no class number; expected {MAX_DIGITS} digits at most")
        return _class_number(int(text), shown)
    if _NUMBER.fullmatch(text):
        return _class_number(float(text), shown)
    if text.startswith(("[", "{")) or _SEVERAL.fullmatch(text):
        raise UserError(f"{shown}: label {_short(text)} is a list or an object; {_EXPECTED}, one for each image")
    if one_line(text) != text:
        raise UserError(f"{shown}: label {_short(text)} has line breaks or control characters; {_EXPECTED}")
    return text


def _class_number(value: int | float, shown: str) -> int:
    if isinstance(value, float) and not value.is_integer():
        if math.isnan(value):
            raise _unlabeled(shown, value)
        raise UserError(
            f"{shown}: label {value} is no class number; expected 0 to {MAX_CLASSES - 1:,}, without fraction"
        )
    if value == -1:
        raise _unlabeled(shown, int(value))
    if not 0 <= value < MAX_CLASSES:
        raise UserError(
            f"{shown}: label {int(value)}; expected a class number from 0 to {MAX_CLASSES - 1:,}; number the classes "
            "from 0, or write their names instead"
        )
    return int(value)


def _unlabeled(shown: str, value: object) -> NoLabelError:
    return NoLabelError(
        f"{shown}: label {_short(value)} means that the image has none; leave out images without labels (an unlabeled "
        "test split is left out where its name says 'test')"
    )


def _short(value: object) -> str:
    text = repr(value[:_SHOWN] if isinstance(value, str | bytes | list) else value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _mixed(shown: str, label: Label, first: str, first_label: Label) -> UserError:
    return UserError(
        f"{shown}: label {_short(label)}, but {first} has {_short(first_label)}: numbers and names are mixed; write "
        "all labels of a source as class numbers, or all as names of classes"
    )


def _too_many_texts(count: int) -> str:
    return f"{count:,} different names of classes, more than the {MAX_CLASSES:,} classes that a set may have"


@dataclass(frozen=True)
class NumberedClasses:
    """Classes of a source, and the labels of its files."""

    classes: tuple[ClassEntry, ...]
    labels: list[NDArray[np.uint32]]
    """For each file the labels of the numbers that `LabelReader.read` gave."""


def number_classes(
    files: Sequence[FileLabels], images: int, *, known: Sequence[ClassEntry] = (), classes: Path | None = None
) -> NumberedClasses:
    """Decide on the classes of a source, once all of its labels are read.

    Args:
        files: their labels; at least one has some.
        images: of all files, with labels.
        known: the classes that the source's metadata gives for its class numbers, more than the largest one.
        classes: file with one class a line that gives the order and the names. Lines are matched by the folder, which
            is the name of the class or its number; where they begin with no numbers, line n names class number n.

    Raises:
        UserError: numbers in one file and names in another; labels far above the number of images; a name of its own
            for every image; a class that the file does not name.
    """
    labeled = [file for file in files if file.first]
    for file in labeled:
        if bool(file.texts) != bool(labeled[0].texts):
            raise UserError(
                f"{file.first}: {_kind(file)}, but {labeled[0].first} is {_kind(labeled[0])}: write all labels of a "
                "source as numbers, or all as names"
            )
    if labeled[0].texts:
        names = sorted({text for file in labeled for text in file.texts})
        if len(names) > MAX_CLASSES:
            raise UserError(f"{labeled[0].first}: {_too_many_texts(len(names))}")
        if classes is None and len(names) == images:
            raise UserError(
                f"{labeled[0].first}: label {_short(labeled[0].texts[0])}: each of the {images:,} images has a text of "
                "its own: captions or file names, not classes; write class numbers, or name the classes with --classes "
                "FILE"
            )
        found = tuple(ClassEntry(folder=name) for name in names)
        places = {name: place for place, name in enumerate(names)}
        labels = [np.array([places[text] for text in file.texts], dtype=np.uint32) for file in files]
    else:
        top, where = largest_label(files)
        if not known and classes is None and top >= max(SMALL_CLASSES, CLASSES_PER_IMAGE * images):
            raise UserError(
                f"{where}: label {top}, which makes {top + 1:,} classes of {images:,} images: ids, or numbers with "
                "gaps; number the classes from 0, or name them all with --classes FILE"
            )
        found = tuple(known) or tuple(ClassEntry(folder=str(label)) for label in range(top + 1))
        labels = [np.arange(file.top + 1, dtype=np.uint32) for file in files]
    if classes is None:
        return NumberedClasses(found, labels)
    wanted = read_classes(classes)
    named = {entry.folder for entry in wanted}
    top = largest_label(files)[0]
    if top < 0 or all(name.isdigit() for name in named) or all(one.folder in named for one in found):
        ordered, move = match_classes(found, wanted, classes)
        return NumberedClasses(ordered, [move[one] for one in labels])
    if top >= len(wanted):
        raise UserError(f"{classes}: --classes names {len(wanted):,} classes, but label {top} occurs; add the others")
    return NumberedClasses(tuple(wanted), labels)


def largest_label(files: Sequence[FileLabels]) -> tuple[int, str]:
    """Return the largest class number of all files and its place, for messages; -1 where labels are names or none."""
    return max(((file.top, file.top_at) for file in files if file.first and not file.texts), default=(-1, ""))


def _kind(file: FileLabels) -> str:
    return "the name of a class" if file.texts else "a class number"

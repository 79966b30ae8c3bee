"""Read, check, and number the labels of tars and Parquet files, for `pipeline shard` and `pipeline index`.

A label is a class number or a class name; all labels of a source must be of the same kind. Class numbers are used as
labels of the shard set. Class names are collected from all files and numbered in sorted order, like class folders.
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
"""Maximum digits of a class number that is written as text."""
MAX_LABEL = 256
"""Maximum characters of a class name; longer texts are considered captions."""
SMALL_CLASSES = 1000
"""Number of classes that is accepted for any number of images."""
CLASSES_PER_IMAGE = 10
"""Above `SMALL_CLASSES`, more classes than this factor times the number of images are considered a mistake."""
_SHOWN = 60  # maximum characters of a label in a message
_EXPECTED = "expected a class number or class name"
_NUMBER = re.compile(
    r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|[+-]?(nan|inf|infinity)", re.ASCII | re.IGNORECASE
)
_SEVERAL = re.compile(r"[+-]?[0-9.]+(\s*[\s,;|]\s*[+-]?[0-9.]+)+", re.ASCII)
_MISSING = ("", "None", "null", "<NA>")  # representations of a missing value in Python, JSON, and pandas


class NoLabelError(UserError):
    """Raised for an image that is marked as having no label: None, NaN, an empty text, or -1."""


@dataclass(frozen=True)
class FileLabels:
    """Summary of the labels of one or several files, returned by worker processes."""

    texts: list[str]
    """Class names in order of first occurrence; empty if the labels are class numbers."""
    first: str
    """Location of the first label, for messages; empty if there are no labels."""
    top: Count
    """Largest class number, or largest index into `texts`."""
    top_at: str
    """Location of the largest class number, for messages."""


class LabelReader:
    """Reads the labels of one or several files, and numbers class names in order of first occurrence."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._texts: list[str] = []
        self._first: tuple[str, Label] | None = None
        self._top = -1
        self._top_at = ""

    def read(self, value: object, shown: str) -> int:
        """Return the class number, or the index of the class name in `FileLabels.texts`.

        Args:
            value: the label; see `parse_label`.
            shown: file and row or member, for messages.

        Raises:
            NoLabelError: see `parse_label`.
            UserError: see `parse_label`; or the label is a number and earlier labels are names, or vice versa.
        """
        label = parse_label(value, shown)
        if self._first is None:
            self._first = shown, label
        elif isinstance(label, str) != isinstance(self._first[1], str):
            raise _mixed(shown, label, *self._first)
        if isinstance(label, str):
            number = self._numbers.setdefault(label, len(self._texts))
            if number == MAX_CLASSES:
                raise UserError(f"{shown}: {_too_many_texts(number + 1)}")
            if number == len(self._texts):
                self._texts.append(label)
            label = number
        if label > self._top:
            self._top, self._top_at = label, shown
        return label

    def folder(self, number: int) -> str:
        """Return the class name for a result of `read`, or the class number as text."""
        return self._texts[number] if self._texts else str(number)

    def found(self) -> FileLabels:
        """Return the summary of the labels read so far."""
        return FileLabels(self._texts, self._first[0] if self._first else "", max(0, self._top), self._top_at)


def parse_label(value: object, shown: str) -> Label:
    """Parse one label.

    Args:
        value: an integer, a bool, a float or decimal with an integer value, or text (str or UTF-8 bytes). Text that is
            such a number is a class number; other text is a class name.
        shown: file and row or member, for messages.

    Returns:
        A class number from 0 to `MAX_CLASSES` - 1, or a class name of at most `MAX_LABEL` characters without control
        characters.

    Raises:
        NoLabelError: the value means that there is no label: None, NaN, an empty text, -1.
        UserError: the value is invalid.
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
    raise UserError(f"{shown}: label {_short(value)} has type {type(value).__name__}; {_EXPECTED}")


def _parse_text(text: str, shown: str) -> Label:
    if text in _MISSING:
        raise _unlabeled(shown, text)
    if len(text) > MAX_LABEL:
        raise UserError(f"{shown}: label {_short(text)} has more than {MAX_LABEL} characters; {_EXPECTED}")
    if text.isascii() and text.isdigit():
        if len(text) > MAX_DIGITS:
            raise UserError(f"{shown}: label {_short(text)} has more than {MAX_DIGITS} digits; {_EXPECTED}")
        return _class_number(int(text), shown)
    if _NUMBER.fullmatch(text):
        return _class_number(float(text), shown)
    if text.startswith(("[", "{")) or _SEVERAL.fullmatch(text):
        raise UserError(f"{shown}: label {_short(text)} is a list or an object; {_EXPECTED}, one per image")
    if one_line(text) != text:
        raise UserError(f"{shown}: label {_short(text)} contains line breaks or control characters; {_EXPECTED}")
    return text


def _class_number(value: int | float, shown: str) -> int:
    if isinstance(value, float) and not value.is_integer():
        if math.isnan(value):
            raise _unlabeled(shown, value)
        raise UserError(
            f"{shown}: label {value} is not a class number; expected an integer from 0 to {MAX_CLASSES - 1:,}"
        )
    if value == -1:
        raise _unlabeled(shown, int(value))
    if not 0 <= value < MAX_CLASSES:
        raise UserError(
            f"{shown}: label {int(value)} is out of range; expected a class number from 0 to {MAX_CLASSES - 1:,}; "
            "number the classes from 0, or use class names instead"
        )
    return int(value)


def _unlabeled(shown: str, value: object) -> NoLabelError:
    return NoLabelError(
        f"{shown}: label {_short(value)} means that the image has no label; remove images without labels (they are "
        "skipped automatically only in files with 'test' in their names)"
    )


def _short(value: object) -> str:
    text = repr(value[:_SHOWN] if isinstance(value, str | bytes | list) else value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _mixed(shown: str, label: Label, first: str, first_label: Label) -> UserError:
    return UserError(
        f"{shown}: label {_short(label)}, but {first} has label {_short(first_label)}: numbers and names are mixed; "
        "write all labels of a source as class numbers, or all as class names"
    )


def _too_many_texts(count: int) -> str:
    return f"{count:,} different class names; at most {MAX_CLASSES:,} classes are allowed"


@dataclass(frozen=True)
class NumberedClasses:
    """Classes of a source, and the labels of its files."""

    classes: tuple[ClassEntry, ...]
    labels: list[NDArray[np.uint32]]
    """For each file: labels of the shard set, indexed by results of `LabelReader.read`."""


def number_classes(
    files: Sequence[FileLabels], images: int, *, known: Sequence[ClassEntry] = (), classes: Path | None = None
) -> NumberedClasses:
    """Determine the classes of a source after all labels have been read.

    Args:
        files: summary of the labels of each file; at least one file has labels.
        images: number of images with labels in all files.
        known: classes by class number, from the metadata of the source; includes the largest class number.
        classes: file with one class per line, which defines the order and names. The first word of a line is the class
            name or number; if the first words are not numbers, line n is for class number n.

    Raises:
        UserError: some files have numbers and others have names; labels far exceed the number of images; every image
            has its own class name; or a class is not in the file `classes`.
    """
    labeled = [file for file in files if file.first]
    for file in labeled:
        if bool(file.texts) != bool(labeled[0].texts):
            raise UserError(
                f"{file.first} is {_kind(file)}, but {labeled[0].first} is {_kind(labeled[0])}; write all labels of a "
                "source as class numbers, or all as class names"
            )
    if labeled[0].texts:
        names = sorted({text for file in labeled for text in file.texts})
        if len(names) > MAX_CLASSES:
            raise UserError(f"{labeled[0].first}: {_too_many_texts(len(names))}")
        if classes is None and len(names) == images:
            raise UserError(
                f"{labeled[0].first}: label {_short(labeled[0].texts[0])}: each of the {images:,} images has a "
                "different text, so the labels are captions or file names, not classes; write class numbers, or list "
                "the classes with --classes FILE"
            )
        found = tuple(ClassEntry(folder=name) for name in names)
        numbers = {name: number for number, name in enumerate(names)}
        labels = [np.array([numbers[text] for text in file.texts], dtype=np.uint32) for file in files]
    else:
        top, where = largest_label(files)
        if not known and classes is None and top >= max(SMALL_CLASSES, CLASSES_PER_IMAGE * images):
            raise UserError(
                f"{where}: label {top} would require {top + 1:,} classes for {images:,} images, so the labels are ids, "
                "or numbers with gaps; number the classes from 0, or list all of them with --classes FILE"
            )
        found = tuple(known) or tuple(ClassEntry(folder=str(label)) for label in range(top + 1))
        labels = [np.arange(file.top + 1, dtype=np.uint32) for file in files]
    if classes is None:
        return NumberedClasses(found, labels)
    listed = read_classes(classes)
    named = {entry.folder for entry in listed}
    top = largest_label(files)[0]
    if top < 0 or all(name.isdigit() for name in named) or all(one.folder in named for one in found):
        ordered, new_labels = match_classes(found, listed, classes)
        return NumberedClasses(ordered, [new_labels[one] for one in labels])
    if top >= len(listed):
        raise UserError(
            f"{classes}: --classes lists {len(listed):,} classes, but label {top} occurs; add the missing classes"
        )
    return NumberedClasses(tuple(listed), labels)


def largest_label(files: Sequence[FileLabels]) -> tuple[int, str]:
    """Return the largest class number of all files and its location; -1 if the labels are names or missing."""
    return max(((file.top, file.top_at) for file in files if file.first and not file.texts), default=(-1, ""))


def _kind(file: FileLabels) -> str:
    return "a class name" if file.texts else "a class number"

"""Find the columns of images and labels, and the class names, in the schema of a Parquet file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shards.errors import UserError
from shards.format.manifest_fields import MAX_CLASSES

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes")
"""Names of the image column, in any case, in order of preference."""
LABEL_COLUMNS = (
    "label",
    "labels",
    "cls",
    "class",
    "class_id",
    "class_label",
    "target",
    "category",
    "fine_label",
    "coarse_label",
)
"""Names of the label column, in any case, in order of preference."""


def find_columns(schema: Any, file: Path) -> tuple[str, str]:
    """Return the names of the image column and of the label column.

    Raises:
        UserError: a column is missing, or has a type that cannot hold images or labels.
    """
    import pyarrow as pa

    names = schema.names
    images, labels = _candidates(names, IMAGE_COLUMNS), _candidates(names, LABEL_COLUMNS)
    if not images or not labels:
        raise UserError(
            f"{file}: has the columns {', '.join(names)}; expected an image column ({' or '.join(IMAGE_COLUMNS)}) "
            f"and a label column ({' or '.join(LABEL_COLUMNS)})"
        )
    image, label = images[0], labels[0]
    for name in (image, label):
        if names.count(name) > 1:
            raise UserError(f"{file}: column {name} occurs {names.count(name)} times; expected only once")
    kind = schema.field(label).type
    if not _holds_labels(kind):
        raise UserError(
            f"{file}: column {label} has type {kind}; expected one class number or class name per image: write such a "
            "column, and omit images with several labels"
        )
    kind = schema.field(image).type
    data, path = kind, None
    if pa.types.is_struct(kind):
        fields = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
        data, path = fields.get("bytes"), fields.get("path")
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_null)
    is_text = path is None or any(is_kind(path) for is_kind in texts)
    if data is None or not (pa.types.is_binary(data) or pa.types.is_large_binary(data)) or not is_text:
        raise UserError(
            f"{file}: column {image} has type {kind}, which cannot hold image bytes; expected binary, or a struct of "
            "bytes (binary) and path (string): export the data set with embedded images"
        )
    return image, label


def _holds_labels(kind: Any) -> bool:
    """Return whether a column of this pyarrow type may hold class numbers or class names."""
    from pyarrow import types

    if types.is_dictionary(kind):
        return _holds_labels(kind.value_type)
    numbers = (types.is_integer, types.is_boolean, types.is_floating, types.is_decimal)
    texts = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    return any(is_kind(kind) for is_kind in numbers + texts)


def other_columns(names: list[str], chosen: tuple[str, str]) -> tuple[str, ...]:
    """Return notes on other columns that could be the image or label column."""
    return tuple(
        f"{what} are read from column '{column}'; not used: {', '.join(others)} (order of preference: "
        f"{', '.join(known)})"
        for what, column, known in zip(("images", "labels"), chosen, (IMAGE_COLUMNS, LABEL_COLUMNS), strict=True)
        if (others := [name for name in _candidates(names, known) if name != column])
    )


def _candidates(names: list[str], known: tuple[str, ...]) -> list[str]:
    """Return those of `names` that are in `known`, in the order of `known`."""
    return [name for candidate in known for name in names if name.lower() == candidate]


def class_names(
    file: Path, metadata: dict[bytes, bytes] | None, column: str
) -> tuple[list[str | None], tuple[str, ...]]:
    """Return the class names from the Hugging Face metadata (an empty list if there are none), and notes on faults."""
    text = (metadata or {}).get(b"huggingface")
    if text is None:
        return [], ()
    try:
        names = json.loads(text)["info"]["features"][column].get("names")
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError):
        return [], (f"{file}: the Hugging Face metadata is damaged, so classes are named by their numbers",)
    if names is None:
        return [], ()
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(names) > MAX_CLASSES:
        return [], (f"{file}: the class names in the metadata are not strings, so classes are named by their numbers",)
    return names, ()

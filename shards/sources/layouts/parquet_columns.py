"""What the schema of a Parquet file says: which columns hold images and labels, and the names of the classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shards.errors import UserError
from shards.format.manifest_fields import MAX_CLASSES

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes")
"""Names of the column of images, in any case; of several the first of these."""
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
"""Names of the column of labels, in any case; of several the first of these."""


def find_columns(schema: Any, file: Path) -> tuple[str, str]:
    """Names of the columns of images and of labels.

    Raises:
        UserError: they are not there, or of types that hold no images or no class numbers.
    """
    import pyarrow as pa

    names = schema.names
    images, labels = _candidates(names, IMAGE_COLUMNS), _candidates(names, LABEL_COLUMNS)
    if not images or not labels:
        raise UserError(
            f"{file}: columns {', '.join(names)}; expected an image ({' or '.join(IMAGE_COLUMNS)}) "
            f"and a label ({' or '.join(LABEL_COLUMNS)})"
        )
    image, label = images[0], labels[0]
    for name in (image, label):
        if names.count(name) > 1:
            raise UserError(f"{file}: column {name} occurs {names.count(name)} times; expected it once")
    kind = schema.field(label).type
    if not _holds_labels(kind):
        raise UserError(
            f"{file}: column {label} is of type {kind}; expected one class number or one text for each image: write "
            "such a column, and leave out images of several labels"
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
            f"{file}: column {image} is of type {kind}, which holds no image bytes; expected binary, or a struct of "
            "bytes (binary) and path (string): export the data set with its images embedded"
        )
    return image, label


def _holds_labels(kind: Any) -> bool:
    """Whether a column of this pyarrow type may hold class numbers or names of classes."""
    from pyarrow import types

    if types.is_dictionary(kind):
        return _holds_labels(kind.value_type)
    numbers = (types.is_integer, types.is_boolean, types.is_floating, types.is_decimal)
    texts = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    return any(is_kind(kind) for is_kind in numbers + texts)


def other_columns(names: list[str], chosen: tuple[str, str]) -> tuple[str, ...]:
    """Notes on columns that could have been chosen instead."""
    return tuple(
        f"column '{column}' holds the {what}; not used: {', '.join(others)} (of several names the first of "
        f"{', '.join(known)} is taken)"
        for what, column, known in zip(("images", "labels"), chosen, (IMAGE_COLUMNS, LABEL_COLUMNS), strict=True)
        if (others := [name for name in _candidates(names, known) if name != column])
    )


def _candidates(names: list[str], known: tuple[str, ...]) -> list[str]:
    """Those of `names` that are among the known ones, in the order of these."""
    return [name for wanted in known for name in names if name.lower() == wanted]


def class_names(
    file: Path, metadata: dict[bytes, bytes] | None, column: str
) -> tuple[list[str | None], tuple[str, ...]]:
    """Names that the hub's own metadata gives the labels, empty where there are none; and what is wrong with them."""
    text = (metadata or {}).get(b"huggingface")
    if text is None:
        return [], ()
    try:
        names = json.loads(text)["info"]["features"][column].get("names")
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError):
        return [], (f"{file}: its Hugging Face metadata is damaged, so the classes are named by their numbers",)
    if names is None:
        return [], ()
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(names) > MAX_CLASSES:
        return [], (f"{file}: its class names are not a list of texts, so the classes are named by their numbers",)
    return names, ()

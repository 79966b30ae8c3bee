"""`pipeline info`: print the contents of a set."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from shards.format.dataset import ShardSet
from shards.redact import printable

BAR = 30  # length of the longest bar, in characters
SIDES = (0, 64, 128, 256, 375, 500, 750, 1000, 2000, 65536)  # bounds of the histogram bins, in pixels


def describe(shard_set: ShardSet, *, classes: int | None = 10, ascii_only: bool = False) -> RenderableType:
    """Return tables of splits, classes, sizes and options, and the digests of the manifest.

    Args:
        classes: maximum number of classes to list; None: all.
        ascii_only: draw bars with ASCII characters.
    """
    return Group(
        _splits(shard_set),
        _classes(shard_set, classes),
        _sides(shard_set, "#" if ascii_only else "█"),
        _provenance(shard_set),
        _digests(shard_set),
    )


def to_dict(shard_set: ShardSet) -> dict[str, Any]:
    """Return the contents of the tables for JSON: sizes in bytes, and all classes."""
    manifest = shard_set.manifest
    per_split = _class_counts(shard_set)
    return {
        "path": str(shard_set.path),
        "digests": [str(digest) for digest in shard_set.digests],
        "splits": {
            name: {
                "images": split.samples,
                "shards": len(split.shards),
                "bytes": sum(split.files.values()),
                "mean_image_bytes": round(float(shard_set.index(name)["size"].mean()), 1),
                "reencoded": int(shard_set.index(name)["repaired"].sum()),
            }
            for name, split in manifest.splits.items()
        },
        "classes": [
            {
                "label": label,
                "folder": entry.folder,
                "name": entry.name,
                "images": {name: int(counts[label]) for name, counts in per_split.items()},
            }
            for label, entry in enumerate(manifest.classes)
        ],
        "made": manifest.made,
    }


def _digests(shard_set: ShardSet) -> Text:
    lines = [f"  {digest}" for digest in shard_set.digests]
    return Text("\n".join(["digests of dataset.json, for --set-digest DIGEST or SET#DIGEST", *lines]))


def _splits(shard_set: ShardSet) -> Table:
    table = Table(title=_text(shard_set.path), title_justify="left")
    for column in ("split", "images", "shards", "bytes", "mean image", "re-encoded", "rejected"):
        table.add_column(column, justify="left" if column == "split" else "right", overflow="fold")
    counts = shard_set.manifest.made.get("images", {})
    for name, split in shard_set.manifest.splits.items():
        index = shard_set.index(name)
        table.add_row(
            _text(name),
            f"{split.samples:,}",
            f"{len(split.shards):,}",
            f"{sum(split.files.values()) / 1e6:,.1f} MB",
            f"{index['size'].mean() / 1e3:,.1f} kB",
            f"{int(index['repaired'].sum()):,}",
            f"{sum(counts.get(name, {}).get('rejected', {}).values()):,}",
        )
    return table


def _class_counts(shard_set: ShardSet) -> dict[str, NDArray[np.int64]]:
    """Return the number of images of each class, int64 [classes], by split."""
    manifest = shard_set.manifest
    return {
        name: np.bincount(shard_set.index(name)["label"], minlength=len(manifest.classes)).astype(np.int64)
        for name in manifest.splits
    }


def _classes(shard_set: ShardSet, shown: int | None) -> Table:
    classes, per_split = shard_set.manifest.classes, _class_counts(shard_set)
    splits = list(per_split)
    table = Table(title=f"{len(classes):,} classes", title_justify="left")
    columns: list[str | Text] = ["label", "folder", "name", *map(_text, splits)]
    for column in columns:
        table.add_column(column, justify="left" if column in ("folder", "name") else "right", overflow="fold")
    for label, entry in list(enumerate(classes))[:shown]:
        table.add_row(
            str(label),
            _text(entry.folder),
            _text(entry.name or ""),
            *(f"{per_split[name][label]:,}" for name in splits),
        )
    if shown is not None and len(classes) > shown:
        table.caption, table.caption_justify = "list all classes: pipeline info SET --classes 0", "left"
        ranges = (f"{n.min():,} to {n.max():,} each" for n in per_split.values())
        table.add_row("...", f"{len(classes) - shown:,} more", "", *ranges)
    return table


def _sides(shard_set: ShardSet, bar: str) -> Table:
    table = Table(title="longer side, in pixels", title_justify="left")
    for column in ("from", "to", "images"):
        table.add_column(column, justify="right", overflow="fold")
    table.add_column("", overflow="crop", no_wrap=True)
    longer = np.concatenate(
        [np.maximum(index["height"], index["width"]) for index in map(shard_set.index, shard_set.manifest.splits)]
    )
    counts, _ = np.histogram(longer, bins=np.array(SIDES))
    for low, high, count in zip(SIDES, SIDES[1:], counts, strict=False):
        if count:
            table.add_row(str(low), str(high - 1), f"{count:,}", bar * max(1, round(BAR * count / counts.max())))
    return table


def _provenance(shard_set: ShardSet) -> Table:
    made = shard_set.manifest.made
    table = Table(title="how the set was created", title_justify="left", show_header=False)
    table.add_column()
    table.add_column()
    table.add_row("tool", _text(made.get("tool", "")))
    table.add_row("source", _text(made.get("source", "")))
    for name, value in made.get("options", {}).items():
        if value is not None:
            if name == "shard_bytes" and isinstance(value, int):
                value = f"{value / 2**20:,g} MiB"  # noqa: PLW2901 - the unit that --shard-size has
            table.add_row(_text(name), _text(value))
    if "filter" in made:
        table.add_row("filter of shrunk images", _text(made["filter"]))
    for name, version in made.get("libraries", {}).items():
        table.add_row(_text(name), _text(version))
    for split, counts in made.get("images", {}).items():
        for what, reasons in (("re-encoded", counts.get("repaired", {})), ("rejected", counts.get("rejected", {}))):
            for reason, count in reasons.items():
                table.add_row(_text(f"{what} in {split}"), _text(f"{count:,}: {reason}"))
    for entry in made.get("unused", []):
        example = f"(such as {entry['example']})"
        table.add_row("not used", _text(f"{entry['count']:,} {entry['kind']}: {entry['reason']} {example}"))
    for note in made.get("notes", []):
        table.add_row("note", _text(note))
    for warning in made.get("warnings", []):
        table.add_row("warning", _text(warning))
    return table


def _text(value: object) -> Text:
    """Return text with control characters escaped, in which rich does not interpret brackets as markup."""
    return Text(printable(value), overflow="fold")

"""`pipeline info`: print the contents of a set."""

from __future__ import annotations

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from shards.format.dataset import ShardSet
from shards.redact import printable

BAR = 30  # length of the longest bar, in characters
SIDES = (0, 64, 128, 256, 375, 500, 750, 1000, 2000, 65536)  # bounds of the histogram bins, in pixels
SHOWN_CLASSES = 10


def describe(shard_set: ShardSet) -> RenderableType:
    """Return tables of splits, classes, sizes and options, and the digests of the manifest."""
    parts = (_splits, _classes, _sides, _provenance, _digests)
    return Group(*(part(shard_set) for part in parts))


def _digests(shard_set: ShardSet) -> Text:
    lines = [f"  {digest}" for digest in shard_set.digests]
    return Text("\n".join(["digests of dataset.json, for --set-digest DIGEST or SET#DIGEST", *lines]))


def _splits(shard_set: ShardSet) -> Table:
    table = Table(title=_text(shard_set.path), title_justify="left")
    for column in ("split", "images", "shards", "bytes", "mean image", "re-encoded", "rejected"):
        table.add_column(column, justify="left" if column == "split" else "right")
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


def _classes(shard_set: ShardSet) -> Table:
    classes = shard_set.manifest.classes
    splits = list(shard_set.manifest.splits)
    per_split = {
        name: np.bincount(shard_set.index(name)["label"], minlength=len(classes)).astype(int) for name in splits
    }
    table = Table(title=f"{len(classes):,} classes", title_justify="left")
    columns: list[str | Text] = ["label", "folder", "name", *map(_text, splits)]
    for column in columns:
        table.add_column(column, justify="left" if column in ("folder", "name") else "right")
    for label, entry in list(enumerate(classes))[:SHOWN_CLASSES]:
        table.add_row(
            str(label),
            _text(entry.folder),
            _text(entry.name or ""),
            *(f"{per_split[name][label]:,}" for name in splits),
        )
    if len(classes) > SHOWN_CLASSES:
        table.add_row("...", "", "", *(f"{n.min():,} to {n.max():,} each" for n in per_split.values()))
    return table


def _sides(shard_set: ShardSet) -> Table:
    table = Table(title="longer side, in pixels", title_justify="left")
    table.add_column("from", justify="right")
    table.add_column("to", justify="right")
    table.add_column("images", justify="right")
    table.add_column("")
    longer = np.concatenate(
        [np.maximum(index["height"], index["width"]) for index in map(shard_set.index, shard_set.manifest.splits)]
    )
    counts, _ = np.histogram(longer, bins=np.array(SIDES))
    for low, high, count in zip(SIDES, SIDES[1:], counts, strict=False):
        if count:
            table.add_row(str(low), str(high - 1), f"{count:,}", "█" * max(1, round(BAR * count / counts.max())))
    return table


def _provenance(shard_set: ShardSet) -> Table:
    made = shard_set.manifest.made
    table = Table(title="how the set was created", title_justify="left", show_header=False)
    table.add_column()
    table.add_column()
    table.add_row("tool", _text(made.get("tool", "")))
    table.add_row("source", _text(made.get("source", "")))
    for name, value in made.get("options", {}).items():
        table.add_row(_text(name), _text(value))
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

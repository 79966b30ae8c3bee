"""The summary that `pipeline shard` and `pipeline index` print: numbers of converted, rejected and unused files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from shards.convert.rejects import first_rejects
from shards.format.dataset import ShardSet
from shards.format.manifest import REJECTS_NAME
from shards.sources.naming.class_warnings import count_labels

SHOWN = 10
"""Maximum number of reasons listed per kind of line, such as `rejected`; the most frequent reasons are listed."""


def summarize(shard_set: ShardSet) -> Iterator[str]:
    """Yield the lines of the summary: totals, splits, re-encoded, rejected and unused files, notes and warnings."""
    manifest = shard_set.manifest
    made, splits, classes = manifest.made, manifest.splits, manifest.classes
    images = made.get("images", {})
    pixels = made.get("options", {}).get("pixels")
    repaired = {split: counts.get("repaired", {}) for split, counts in images.items()}
    rejected = {split: counts.get("rejected", {}) for split, counts in images.items()}
    unused = sorted(made.get("unused", []), key=lambda one: -one["count"])
    not_used = f", {sum(one['count'] for one in unused):,} not used" if unused else ""
    yield (
        f"{shard_set.path}: {' + '.join(f'{entry.samples:,} {split}' for split, entry in splits.items())} images of "
        f"{_count(len(classes), 'class')}, {_total(repaired):,} {'repaired' if pixels else 're-encoded'}, "
        f"{_total(rejected):,} rejected{not_used}"
    )
    for split, entry in splits.items():
        each = count_labels(shard_set.index(split)["label"], len(classes))
        present = each[each > 0]
        fewest, most = int(present.min()), int(present.max())
        yield (
            f"{split}: {_count(entry.samples, 'image')} of {_count(len(present), 'class')}, "
            f"{f'{most:,}' if fewest == most else f'{fewest:,} to {most:,}'} each, in "
            f"{_count(len(entry.shards), 'shard')}"
        )
        if split in made.get("class_run", {}):
            length = f"{made['class_run'][split]:g}"
            yield f"{split}: in the order of the tars, where runs of one class have a mean length of {length}"
    kind = "repaired" if pixels else "re-encoded as plain JPEG"
    yield from _shortened(f"{kind}: {count:,} {split}: {reason}" for split, reason, count in _sorted(repaired))
    examples = first_rejects(shard_set.path) if _total(rejected) else {}
    yield from _shortened(
        f"rejected: {count:,} {split}: {reason} (such as {examples.get((split, reason), 'one of its files')})"
        for split, reason, count in _sorted(rejected)
    )
    if examples:
        yield f"rejected: all rejects are listed in {shard_set.path / REJECTS_NAME}"
    yield from _shortened(
        f"not used: {one['count']:,} {one['kind']}: {one['reason']} (such as {one['example']})" for one in unused
    )
    yield from (f"note: {line}" for line in made.get("notes", []))
    yield from (f"warning: {line}" for line in made.get("warnings", []))


def _count(number: int, what: str) -> str:
    ending = "" if number == 1 else "es" if what.endswith("s") else "s"
    return f"{number:,} {what}{ending}"


def _total(counts: Mapping[str, Mapping[str, int]]) -> int:
    return sum(sum(reasons.values()) for reasons in counts.values())


def _sorted(counts: Mapping[str, Mapping[str, int]]) -> list[tuple[str, str, int]]:
    """Return (split, reason, number of images) tuples, with the most frequent reason first."""
    flat = [(split, reason, count) for split, reasons in counts.items() for reason, count in reasons.items()]
    return sorted(flat, key=lambda one: -one[2])


def _shortened(lines: Iterable[str]) -> list[str]:
    listed = list(lines)
    if len(listed) <= SHOWN:
        return listed
    kind = listed[0].partition(":")[0]
    return [*listed[:SHOWN], f"{kind}: for {len(listed) - SHOWN:,} more reasons (see dataset.json)"]

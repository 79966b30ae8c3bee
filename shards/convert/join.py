"""The last step of a conversion: join the records of all shards into index, list of rejects and manifest."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shards.convert.conversion_plan import ConversionPlan
from shards.convert.records import ShardDone
from shards.convert.rejects import Reject, count_reasons, write_rejects
from shards.convert.source_attribute import record_source
from shards.convert.work_folder import WorkFolder
from shards.convert.write_beton import write_betons
from shards.errors import ConversionFailed
from shards.format.manifest import MANIFEST_NAME, REJECTS_NAME, Manifest, tool_version
from shards.format.manifest_fields import BetonEntry, ShardEntry, SplitEntry, UnusedRecord
from shards.redact import one_line
from shards.sources.naming.class_warnings import blank_image_warnings, count_labels, rejected_class_warnings
from shards.sources.unused import UnusedEntry

Done = dict[tuple[str, int], ShardDone]


@dataclass(frozen=True)
class ConversionResult:
    """Manifest and counts of a finished conversion."""

    manifest: Manifest
    rejected: int
    """Number of images that were not converted."""
    repaired: int
    """Number of images that were re-encoded."""


def published_names(work: WorkFolder, plan: ConversionPlan) -> list[str]:
    """Return the names of the files that `join` writes, except the manifest."""
    paths = [work.index(split) for split in plan.shards]
    for split in plan.shards if plan.beton else ():
        paths += [work.beton(split), work.beton_index(split)]
    return [REJECTS_NAME, *(path.name for path in paths)]


def join(
    work: WorkFolder,
    plan: ConversionPlan,
    max_rejects: float,
    workers: int | None,
    *,
    strict: bool = False,
) -> ConversionResult:
    """Write index, list of rejects and manifest of a set whose shards are all done.

    Args:
        strict: fail on warnings about likely mistakes in the source.

    Raises:
        ConversionFailed: more than the fraction `max_rejects` of the images was rejected, a split has no images left,
            or there are warnings and `strict` is set. Shards and list of rejects are kept; no manifest is written.
    """
    done = {job: work.load_done(*job) for job in plan.jobs}
    rejects = [
        Reject(split=split, image=image, reason=reason)
        for (split, _), shard in done.items()
        for image, reason in shard.rejected
    ]
    late = _image_warnings(work, plan, done)
    if strict and late:
        print_notes(warnings=late)
        raise ConversionFailed(
            f"{work.out}: --strict: {summarize_warnings(late)}; correct the source and convert it to another --out, "
            "or omit --strict"
        )
    rejects_hash = write_rejects(work, rejects, sum(shard.samples for shard in done.values()), max_rejects)
    kept = {split: _drop_empty(work, split, done) for split in plan.shards}
    betons = write_betons(work, kept, plan.beton, workers, pixels=plan.rules.pixels) if plan.beton else {}
    manifest = Manifest(
        classes=plan.classes,
        splits={
            split: _join_split(work, split, kept[split], done, betons.get(split), pixels=plan.rules.pixels)
            for split in plan.shards
        },
        made={
            "tool": tool_version(),
            "source": plan.layout,
            "source_digest": plan.digest,
            "shuffled": True,
            "options": plan.options,
            **({"filter": plan.rules.filter} if plan.rules.shrinks else {}),
            **({"libraries": plan.libraries} if plan.libraries else {}),
            "images": {
                split: {"repaired": _repaired(done, split), "rejected": count_reasons(rejects, split)}
                for split in plan.shards
            },
            "unused": to_unused_records(plan.unused),
            "notes": list(plan.notes),
            "warnings": [*plan.warnings, *late],
            "rejects_hash": rejects_hash,
        },
    )
    record_source(work.out, plan.source)
    publish_manifest(work, manifest)
    rewritten = sum(shard.rewritten for shard in done.values())
    if rewritten:  # only printed: the manifest must be the same for all sets with the same bytes
        fact = f"{rewritten:,} files were modified after they were listed, without a change of size"
        print_notes([f"{fact}; the set contains their content at the time of reading"])
    work.remove()
    repaired = sum(sum(shard.repaired.values()) for shard in done.values())
    return ConversionResult(manifest, len(rejects), repaired)


def to_unused_records(entries: Iterable[UnusedEntry]) -> list[UnusedRecord]:
    """Convert the counts of unused files to their manifest format."""
    return [UnusedRecord(reason=one.reason, kind=one.kind, count=one.count, example=one.example) for one in entries]


def print_notes(notes: Iterable[str] = (), warnings: Iterable[str] = ()) -> None:
    """Print notes and warnings about a source on standard error."""
    for kind, lines in (("note", notes), ("warning", warnings)):
        for line in lines:
            print(f"{kind}: {one_line(line)}", file=sys.stderr)


def summarize_warnings(warnings: Sequence[str]) -> str:
    """Return the first warning and the number of further warnings."""
    return warnings[0] + (f" (and {len(warnings) - 1:,} more warnings)" if len(warnings) > 1 else "")


def _image_warnings(work: WorkFolder, plan: ConversionPlan, done: Done) -> list[str]:
    """Return the warnings that are only known after the images have been read."""
    classes = len(plan.classes)
    lines: list[str] = []
    for split in plan.shards:
        shards = {shard: record for (of, shard), record in done.items() if of == split}
        if any(record.rejected for record in shards.values()):
            listed = count_labels(work.load_listing(split)[0].rows["label"], classes)
            kept = count_labels(np.concatenate([work.load_rows(split, shard)["label"] for shard in shards]), classes)
            lines += rejected_class_warnings(split, plan.classes, listed, kept)
        samples = sum(record.samples for record in shards.values())
        lines += blank_image_warnings(split, sum(record.blank for record in shards.values()), samples)
    return lines


def _drop_empty(work: WorkFolder, split: str, done: Done) -> list[int]:
    """Remove the files of shards whose images were all rejected; return the other shards' numbers."""
    kept = [shard for (of, shard), record in done.items() if of == split and record.samples]
    if not kept:
        listed = work.out / REJECTS_NAME
        raise ConversionFailed(f"{work.out}: all images of split '{split}' were rejected; see {listed}")
    for of, shard in done:
        if of == split and shard not in kept:
            work.tar(split, shard).unlink(missing_ok=True)
            work.tar(split, shard).with_suffix(".idx").unlink(missing_ok=True)
    return kept


def _join_split(
    work: WorkFolder, split: str, shards: list[int], done: Done, beton: BetonEntry | None, *, pixels: bool
) -> SplitEntry:
    """Write the index of the split's tars, and return the split's manifest entry."""
    records = [done[split, shard] for shard in shards]
    samples = sum(record.samples for record in records)
    if beton is None or work.keeps_tars:
        rows = (work.load_rows(split, shard) for shard in shards)
        index = work.index(split).name
        digest = work.publish_index(index, samples, rows)
        entries = [
            ShardEntry(name=work.tar(split, shard).name, samples=record.samples, bytes=record.bytes, hash=record.hash)
            for shard, record in zip(shards, records, strict=True)
        ]
    else:
        index, digest = beton.index, beton.index_hash
        entries = [
            ShardEntry(name=beton.name, samples=record.samples, bytes=beton.bytes, hash=segment)
            for record, segment in zip(records, beton.segments, strict=True)
        ]
    return SplitEntry(
        samples=samples,
        shards=tuple(entries),
        index=index,
        index_hash=digest,
        pixels=pixels and work.keeps_tars,
        beton=beton,
    )


def publish_manifest(work: WorkFolder, manifest: Manifest) -> None:
    """Write the manifest, which completes the set.

    Raises:
        UserError: another process has written a manifest in the meantime.
    """
    work.reject_foreign_files([MANIFEST_NAME])
    manifest.save(work.out)


def _repaired(done: Done, split: str) -> dict[str, Any]:
    repaired: Counter[str] = Counter()
    for (of, _), record in done.items():
        repaired.update(record.repaired if of == split else {})
    return dict(sorted(repaired.items()))

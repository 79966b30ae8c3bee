"""The last step of a conversion: join what the shards recorded into the index, the list of rejects and the manifest."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

from shards.assemble import assemble
from shards.errors import ConversionFailed
from shards.manifest import MANIFEST_NAME, BetonEntry, Manifest, ShardEntry, SplitEntry, UnusedRecord, tool
from shards.rejects import REJECTS_NAME, Reject, count_reasons, settle_rejects
from shards.sources.unused import UnusedEntry
from shards.work import Plan, ShardDone, Work

Done = dict[tuple[str, int], ShardDone]


@dataclass(frozen=True)
class Outcome:
    """What a finished conversion made."""

    manifest: Manifest
    rejected: int
    repaired: int
    unused: tuple[UnusedEntry, ...]
    """What of the source the set does not use."""


def published_names(work: Work, plan: Plan) -> list[str]:
    """Names of the files that `join` writes, the manifest apart."""
    paths = [work.index(split) for split in plan.shards]
    for split in plan.shards if plan.beton else ():
        paths += [work.beton(split), work.beton_index(split)]
    return [REJECTS_NAME, *(path.name for path in paths)]


def join(work: Work, plan: Plan, max_rejects: float, workers: int | None) -> Outcome:
    """Publish the set whose shards are all done.

    Raises:
        ConversionFailed: more than the share `max_rejects` of the images was rejected, or none of a split is left.
            The shards and the list of rejects stay, the manifest is not written.
    """
    done = {job: work.load_done(*job) for job in plan.jobs}
    rejects = [
        Reject(split=split, image=image, reason=reason)
        for (split, _), shard in done.items()
        for image, reason in shard.rejected
    ]
    rejects_hash = settle_rejects(work, rejects, sum(shard.samples for shard in done.values()), max_rejects)
    kept = {split: _drop_empty(work, split, done) for split in plan.shards}
    betons = assemble(work, kept, plan.beton, workers) if plan.beton else {}
    manifest = Manifest(
        classes=plan.classes,
        splits={split: _join_split(work, split, kept[split], done, betons.get(split)) for split in plan.shards},
        made={
            "tool": tool(),
            "source": plan.layout,
            "shuffled": True,
            "options": plan.options,
            "images": {
                split: {"repaired": _repaired(done, split), "rejected": count_reasons(rejects, split)}
                for split in plan.shards
            },
            "unused": [
                UnusedRecord(reason=entry.reason, kind=entry.kind, count=entry.count, example=entry.example)
                for entry in plan.unused
            ],
            "doubts": list(plan.doubts),
            "rejects_hash": rejects_hash,
        },
    )
    publish_manifest(work, manifest)
    rewritten = sum(shard.rewritten for shard in done.values())
    if rewritten:
        print(
            f"note: {rewritten:,} files were written to after they were listed, with the same size; the set has what "
            "they held when they were read",
            file=sys.stderr,
        )
    work.close()
    repaired = sum(sum(shard.repaired.values()) for shard in done.values())
    return Outcome(manifest, len(rejects), repaired, plan.unused)


def _drop_empty(work: Work, split: str, done: Done) -> list[int]:
    """Numbers of the split's shards, without those of which nothing is left, whose files are removed."""
    kept = [shard for (of, shard), record in done.items() if of == split and record.samples]
    if not kept:
        raise ConversionFailed(f"{work.out}: no image of split '{split}' can be used; see {work.out / REJECTS_NAME}")
    for of, shard in done:
        if of == split and shard not in kept:
            work.tar(split, shard).unlink(missing_ok=True)
            work.tar(split, shard).with_suffix(".idx").unlink(missing_ok=True)
    return kept


def _join_split(work: Work, split: str, shards: list[int], done: Done, beton: BetonEntry | None) -> SplitEntry:
    """Write the index of the split's tars; that of a .beton is written with it."""
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
    return SplitEntry(samples=samples, shards=tuple(entries), index=index, index_hash=digest, beton=beton)


def publish_manifest(work: Work, manifest: Manifest) -> None:
    """Write the manifest, which makes the folder a set.

    Raises:
        UserError: another process has written one meanwhile.
    """
    work.refuse_foreign([MANIFEST_NAME])
    manifest.save(work.out)


def _repaired(done: Done, split: str) -> dict[str, Any]:
    repaired: Counter[str] = Counter()
    for (of, _), record in done.items():
        repaired.update(record.repaired if of == split else {})
    return dict(sorted(repaired.items()))

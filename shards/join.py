"""The last step of a conversion: join what the shards recorded into the index, the list of rejects and the manifest."""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import xxhash

from shards.durable import durable_file, durable_write, write_all
from shards.errors import ConversionFailed
from shards.index import INDEX_DTYPE
from shards.manifest import Manifest, ShardEntry, SplitEntry
from shards.work import Plan, ShardDone, Work

REJECTS_NAME = "rejects.jsonl"


@dataclass(frozen=True)
class Outcome:
    """What a finished conversion made."""

    manifest: Manifest
    rejected: int
    repaired: int


def join(work: Work, plan: Plan, max_rejects: float) -> Outcome:
    """Publish the set whose shards are all done.

    Raises:
        ConversionFailed: more than the share `max_rejects` of the images was rejected, or none of a split is left.
            The shards and the list of rejects stay, the manifest is not written.
    """
    done = {(split, i): work.load_done(split, i) for split, i in plan.jobs}
    rejects = [{"split": split, **reject} for (split, _), shard in done.items() for reject in shard.rejected]
    rejects_hash = _write_rejects(work, rejects)
    kept = sum(shard.samples for shard in done.values())
    if len(rejects) > max_rejects * (kept + len(rejects)):
        raise ConversionFailed(
            f"{work.out}: {len(rejects)} of {kept + len(rejects)} images rejected, more than --max-rejects "
            f"{max_rejects:g} allows; see {work.out / REJECTS_NAME}, then mend the source and start anew, or allow more"
        )
    splits = {split: _join_split(work, split, done) for split in plan.shards}
    manifest = Manifest(classes=plan.classes, splits=splits, made=_made(plan, done) | {"rejects_hash": rejects_hash})
    manifest.save(work.out)
    shutil.rmtree(work.path, ignore_errors=True)
    return Outcome(manifest, len(rejects), sum(sum(shard.repaired.values()) for shard in done.values()))


def _write_rejects(work: Work, rejects: list[dict[str, str]]) -> str | None:
    """Returns the list's hash; None (and no list) when nothing was rejected."""
    path = work.out / REJECTS_NAME
    if not rejects:
        path.unlink(missing_ok=True)
        return None
    rejects = sorted(rejects, key=lambda reject: (reject["split"], reject["image"]))
    content = "".join(json.dumps(reject, ensure_ascii=False) + "\n" for reject in rejects).encode()
    durable_write(path, content)
    return xxhash.xxh3_64_hexdigest(content)


def _join_split(work: Work, split: str, done: dict[tuple[str, int], ShardDone]) -> SplitEntry:
    """Write the split's index, shard by shard; shards of which nothing is left are dropped."""
    kept = []
    for (of, shard), record in done.items():
        if of != split:
            continue
        if record.samples:
            kept.append((shard, record))
        else:
            work.tar(split, shard).unlink(missing_ok=True)
            work.tar(split, shard).with_suffix(".idx").unlink(missing_ok=True)
    samples = sum(record.samples for _, record in kept)
    if samples == 0:
        raise ConversionFailed(f"{work.out}: no image of split '{split}' can be used; see {work.out / REJECTS_NAME}")
    index = work.out / f"{split}.index.npy"
    digest = xxhash.xxh3_64()
    with durable_file(index) as file:
        for content in _index_parts(work, split, [shard for shard, _ in kept], samples):
            digest.update(content)
            write_all(file, content)
    return SplitEntry(
        samples=samples,
        shards=tuple(
            ShardEntry(name=work.tar(split, shard).name, samples=record.samples, bytes=record.bytes, hash=record.hash)
            for shard, record in kept
        ),
        index=index.name,
        index_hash=digest.hexdigest(),
    )


def _index_parts(work: Work, split: str, shards: list[int], samples: int) -> Iterator[bytes]:
    yield npy_header(samples)
    for place, shard in enumerate(shards):
        rows = work.load_rows(split, shard)
        rows["shard"] = place
        yield rows.tobytes()


def npy_header(samples: int) -> bytes:
    """The .npy header (format 1.0) of an index of that many rows."""
    out = io.BytesIO()
    empty = np.zeros(0, dtype=INDEX_DTYPE)
    np.lib.format.write_array_header_1_0(out, np.lib.format.header_data_from_array_1_0(empty) | {"shape": (samples,)})
    return out.getvalue()


def _made(plan: Plan, done: dict[tuple[str, int], ShardDone]) -> dict[str, Any]:
    counts: dict[str, Any] = {}
    for split in plan.shards:
        records = [record for (of, _), record in done.items() if of == split]
        repaired: Counter[str] = Counter()
        for record in records:
            repaired.update(record.repaired)
        rejected = Counter(reject["reason"] for record in records for reject in record.rejected)
        counts[split] = {"repaired": dict(sorted(repaired.items())), "rejected": dict(sorted(rejected.items()))}
    return {
        "tool": f"fat-pipeline {version('fat-pipeline')}",
        "source": plan.layout,
        "shuffled": True,
        "options": plan.options,
        "images": counts,
        "ignored_files": plan.ignored,
    }

"""`pipeline index`: make a set of existing WebDataset tars where they lie, without copying them.

Only an index and a manifest are added. The order of the samples stays whoever wrote the tars', so the manifest says
that it is not our shuffle, and how long the runs of one class are in it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from shards.errors import UserError, explained
from shards.images import Accepted, ImageRules, Rejected, accept
from shards.index import INDEX_DTYPE, Index, write_index
from shards.manifest import MANIFEST_NAME, ClassEntry, Manifest, ShardEntry, SplitEntry, tool
from shards.pool import Report, run_jobs
from shards.progress import Progress
from shards.rejects import MAX_REJECTS, Reject, count_reasons, settle_rejects
from shards.sources.classes import read_classes
from shards.sources.webdataset import read_tar, split_of
from shards.writer import index_row

CHUNK = 2**22


@dataclass(frozen=True)
class AdoptJob:
    """One tar to be indexed in a worker process."""

    tar: Path
    rules: ImageRules


@dataclass(frozen=True)
class Adopted:
    """What was found in a tar."""

    split: str
    entry: ShardEntry
    rows: Index
    """`INDEX_DTYPE` [samples]; `shard` is set when the tars are joined."""
    rejected: list[Reject]


def adopt(
    tars: list[Path],
    rules: ImageRules,
    classes: Path | None = None,
    max_rejects: float = MAX_REJECTS,
    workers: int | None = None,
) -> Manifest:
    """Write the index and the manifest of `tars` into the folder in which they all lie.

    Raises:
        UserError: they do not lie in one folder, or it is a set already; a tar is damaged or has no samples.
        ConversionFailed: more than the share `max_rejects` of the images cannot be used as they are.
    """
    folders = {tar.absolute().parent for tar in tars}
    if len(folders) != 1:
        raise UserError(f"the tars lie in {len(folders)} folders, but a set is one folder; index each of them")
    (folder,) = folders
    if (folder / MANIFEST_NAME).exists():
        raise UserError(f"{folder}: is a shard set already; remove its {MANIFEST_NAME} to index it anew")
    names = read_classes(classes) if classes else None
    jobs = [AdoptJob(folder / name, rules) for name in sorted({tar.name for tar in tars})]
    missing = [job.tar for job in jobs if not job.tar.is_file()]
    if missing:
        raise UserError(f"{missing[0]}: no such file")
    with Progress("indexing", sum(job.tar.stat().st_size for job in jobs), "bytes") as progress:
        found = run_jobs(index_tar, jobs, workers, progress)
    rejects = [reject for one in found for reject in one.rejected]
    rejects_hash = settle_rejects(folder, rejects, sum(len(one.rows) for one in found), max_rejects)
    splits: dict[str, list[Adopted]] = {}
    for one in found:
        if len(one.rows):
            splits.setdefault(one.split, []).append(one)
    top = max(int(one.rows["label"].max()) for ones in splits.values() for one in ones)
    if names is not None and top >= len(names):
        raise UserError(f"{classes}: names {len(names)} classes, but label {top} occurs")
    manifest = Manifest(
        classes=tuple(names or (ClassEntry(folder=str(label)) for label in range(top + 1))),
        splits={split: _join(folder, split, splits[split]) for split in sorted(splits)},
        made={
            "tool": tool(),
            "source": "webdataset, where it lies",
            "shuffled": False,
            "class_run": {split: class_run([one.rows for one in ones]) for split, ones in sorted(splits.items())},
            "options": {"check": rules.check},
            "images": {split: {"rejected": count_reasons(rejects, split)} for split in sorted(splits)},
            "rejects_hash": rejects_hash,
        },
    )
    manifest.save(folder)
    return manifest


def class_run(shards: list[Index]) -> float:
    """Mean length of the runs of one label, in the order of the rows; little over 1 where samples are shuffled."""
    labels = np.concatenate([rows["label"] for rows in shards])
    return round(len(labels) / (1 + np.count_nonzero(labels[1:] != labels[:-1])), 2)


def _join(folder: Path, split: str, found: list[Adopted]) -> SplitEntry:
    samples = sum(len(one.rows) for one in found)
    path = folder / f"{split}.index.npy"
    digest = write_index(path, samples, (one.rows for one in found))
    shards = tuple(one.entry for one in found)
    return SplitEntry(samples=samples, shards=shards, index=path.name, index_hash=digest)


def index_tar(job: AdoptJob, report: Report) -> Adopted:
    """Read a tar once for its hash and once for its images."""
    samples, _ = read_tar(job.tar)
    rows = np.zeros(len(samples), dtype=INDEX_DTYPE)
    split = split_of(job.tar, job.tar.parent)
    rejected: list[Reject] = []
    digest = xxhash.xxh3_64()
    kept = 0
    with explained(job.tar), job.tar.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            report(len(chunk), len(chunk))
        size = file.tell()
        for sample in samples:
            data = os.pread(file.fileno(), sample.image.size, sample.image.offset)
            try:
                rows[kept] = index_row(_as_it_is(data, job.rules), sample.label, sample.image.offset, 0)
                kept += 1
            except Rejected as error:
                where = f"{job.tar.name}/{sample.image.name}"
                rejected.append(Reject(split=split, image=where, reason=str(error)))
    entry = ShardEntry(name=job.tar.name, samples=kept, bytes=size, hash=digest.hexdigest())
    return Adopted(split, entry, rows[:kept], rejected)


def _as_it_is(data: bytes, rules: ImageRules) -> Accepted:
    image = accept(data, rules)
    if image.repair:
        raise Rejected(f"{image.repair}: 'pipeline shard' repairs such images, 'pipeline index' copies nothing")
    return image

"""Index one tar for `pipeline index`, in a worker process."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from shards.convert.rejects import Reject
from shards.convert.writer import index_row
from shards.errors import ConversionFailed, UserError, reading
from shards.files.regular import open_regular
from shards.format.index import INDEX_DTYPE, Index
from shards.format.manifest_fields import ShardEntry
from shards.images.accept import accept
from shards.images.limits import MAX_ENCODED
from shards.images.ppm import accept_ppm
from shards.images.rules import Accepted, ImageRules, Rejected
from shards.redact import one_line
from shards.sources.layouts.members import Member
from shards.sources.layouts.tar_samples import read_tar
from shards.sources.layouts.webdataset import split_of
from shards.sources.listing import Container
from shards.sources.naming.labels import FileLabels, LabelReader
from shards.sources.unused import UnusedEntry
from shards.workers.worker import Report

CHUNK = 2**22
MIXED = (
    "both JPEGs and pixels (KEY.ppm), but a split must have only one of them; convert the tars with 'pipeline shard' "
    "instead"
)


@dataclass(frozen=True)
class IndexJob:
    """One tar to be indexed in a worker process."""

    tar: Path
    rules: ImageRules


@dataclass(frozen=True)
class IndexedTar:
    """The content of one tar."""

    split: str
    entry: ShardEntry
    rows: Index
    """`INDEX_DTYPE` [samples]; `shard` and the final `label` are set when the rows of all tars are joined."""
    rejected: list[Reject]
    labels: FileLabels
    listed: NDArray[np.int64]
    """int64 [samples]: labels of all samples including rejected ones, numbered as in `labels` until the rows of
    all tars are joined."""
    pixels: bool
    """Whether the images are pixels (KEY.ppm) instead of JPEGs."""
    blank: int
    """Number of images that are nearly black or of a single color."""
    unused: tuple[UnusedEntry, ...]


def index_tar(job: IndexJob, report: Report) -> IndexedTar:
    """Hash a tar and read its images. Runs in a worker process.

    Raises:
        UserError: the tar is damaged, a sample is incomplete, or there are both JPEGs and pixels.
        ConversionFailed: the tar was modified during indexing.
        StorageFailed: the tar cannot be read.
    """
    container = Container.of(job.tar)
    split = split_of(job.tar, job.tar.parent)
    labels = LabelReader()
    samples, unused = read_tar(job.tar, labels, split)
    rows = np.zeros(len(samples), dtype=INDEX_DTYPE)
    rejected: list[Reject] = []
    digest = xxhash.xxh3_64()
    kept = blank = pixels = 0
    with reading(job.tar), os.fdopen(open_regular(job.tar), "rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            report(len(chunk), len(chunk))
        size = file.tell()
        for sample in samples:
            report.start(f"{job.tar}: {sample.image.name}".encode("utf-8", "surrogateescape"))
            try:
                data = _read_image(file.fileno(), sample.image)
                image = accept_ppm(data) or _accept_unrepaired(data, job.rules)
                ppm_bytes = len(data) - len(image.data)
                rows[kept] = index_row(image, sample.label, sample.image.offset + ppm_bytes, 0)
                kept += 1
                pixels += ppm_bytes > 0
                blank += image.blank
            except Rejected as error:
                where = f"{one_line(job.tar.name)}/{one_line(sample.image.name)}"
                rejected.append(Reject(split=split, image=where, reason=one_line(str(error))))
        if not container.is_still(os.fstat(file.fileno())) or size != container.size:
            raise ConversionFailed(f"{job.tar}: was modified while it was indexed; run the same command again")
    if 0 < pixels < kept:
        raise UserError(f"{job.tar}: has {MIXED}")
    entry = ShardEntry(name=job.tar.name, samples=kept, bytes=size, hash=digest.hexdigest())
    listed = np.array([sample.label for sample in samples], dtype=np.int64)
    return IndexedTar(split, entry, rows[:kept], rejected, labels.found(), listed, pixels > 0, blank, unused)


def _read_image(handle: int, member: Member) -> bytes:
    if member.size > MAX_ENCODED:
        raise Rejected(f"{member.size:,} bytes, more than the {MAX_ENCODED:,} bytes that are allowed")
    return os.pread(handle, member.size, member.offset)


def _accept_unrepaired(data: bytes, rules: ImageRules) -> Accepted:
    image = accept(data, rules)
    if image.repair:
        raise Rejected(f"{image.repair}: 'pipeline shard' re-encodes such images, but 'pipeline index' cannot")
    return image

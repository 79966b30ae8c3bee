"""The .beton of a split, from its finished shards: filled by processes, resumable, published by rename."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import simplejpeg
import xxhash
from numpy.typing import NDArray

from shards.beton import BetonOptions, lay_out
from shards.durable import sync_folder, write_all
from shards.manifest import BetonEntry
from shards.pool import Report, run_jobs
from shards.progress import Progress
from shards.work import Work


@dataclass(frozen=True)
class SegmentJob:
    """One shard's part of the file, to be filled in a worker process from the shard's finished tar."""

    work: Work
    split: str
    shard: int
    offsets: NDArray[np.int64]
    """int64 [samples of the shard]: where each image goes."""
    raw: NDArray[np.bool_]
    """bool [samples of the shard]: as pixels."""
    start: int
    stop: int
    """First byte of the part, and of what follows it."""


def assemble(work: Work, split: str, shards: list[int], options: BetonOptions, workers: int | None) -> BetonEntry:
    """Write SPLIT.beton, or go on with it where a killed run left it.

    Where the set keeps no tars, each is removed when its images are safe in the .beton: the disk never holds all twice.
    """
    index = np.concatenate([work.load_rows(split, shard) for shard in shards])
    index["shard"] = np.repeat(np.arange(len(shards)), [len(work.load_rows(split, shard)) for shard in shards])
    layout = lay_out(index, options)
    target, unfinished = work.beton(split), work.unfinished_beton(split)
    if not target.exists():
        with unfinished.open("ab") as file:
            file.truncate(layout.total)
        jobs = []
        for place, shard in enumerate(shards):
            mine = index["shard"] == place
            start, stop = int(layout.starts[place]), int(layout.starts[place + 1])
            jobs.append(SegmentJob(work, split, shard, layout.offsets[mine], layout.raw[mine], start, stop))
        todo = [job for job in jobs if not work.is_in_beton(split, job.shard)]
        with Progress(f"{split}.beton", sum(len(job.offsets) for job in todo)) as progress:
            run_jobs(fill_segment, todo, workers, progress)
        with unfinished.open("r+b", buffering=0) as file:
            write_all(file, layout.head(index))
            file.seek(int(layout.starts[-1]))
            write_all(file, layout.table())
            os.fsync(file.fileno())
        unfinished.rename(target)
        sync_folder(work.out)
    segments = tuple(work.load_segment(split, shard)[0] for shard in shards)
    return BetonEntry(
        name=target.name, bytes=layout.total, mode=options.mode, smart_ratio=options.smart_ratio, segments=segments
    )


def fill_segment(job: SegmentJob, report: Report) -> None:
    """Write a shard's part; record its hash, and the rows with offset, size and hash of what it holds."""
    work = job.work
    tar = work.tar(job.split, job.shard)
    rows = work.load_rows(job.split, job.shard)
    digest = xxhash.xxh3_64()
    at = job.start
    with tar.open("rb") as source, work.unfinished_beton(job.split).open("r+b", buffering=0) as target:
        target.seek(at)

        def write(content: bytes) -> None:
            nonlocal at
            digest.update(content)
            write_all(target, content)
            at += len(content)

        for row, offset, raw in zip(rows, job.offsets.tolist(), job.raw.tolist(), strict=True):
            data = os.pread(source.fileno(), int(row["size"]), int(row["offset"]))
            report(1, len(data))
            if raw:
                data = simplejpeg.decode_jpeg(data, "RGB").tobytes()
            write(bytes(offset - at))
            write(data)
            row["offset"], row["size"], row["hash"] = offset, len(data), xxhash.xxh3_64_intdigest(data)
        write(bytes(job.stop - at))
        os.fsync(target.fileno())
    work.save_segment(job.split, job.shard, digest.hexdigest(), rows)
    if not work.keeps_tars:
        tar.unlink()

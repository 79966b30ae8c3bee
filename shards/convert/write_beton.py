"""Write the .beton file of each split from its finished shards, in parallel and resumably."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import simplejpeg
import xxhash
from numpy.typing import NDArray

from shards.convert.work_folder import WorkFolder
from shards.errors import ConversionFailed, explain_os_errors
from shards.files.durable import write_all
from shards.format.beton import BetonLayout, BetonOptions, compute_layout
from shards.format.index import Index
from shards.format.manifest_fields import BetonEntry
from shards.progress import Progress
from shards.workers.pool import run_jobs
from shards.workers.worker import Report


@dataclass(frozen=True)
class SegmentJob:
    """One segment (a shard's part) of a .beton file, to be written in a worker process from the shard's tar."""

    work: WorkFolder
    split: str
    shard: int
    offsets: NDArray[np.int64]
    """int64 [samples of the shard]: offset of each image in the file."""
    decode: NDArray[np.bool_]
    """bool [samples of the shard]: a JPEG in the tar that is stored as pixels."""
    start: int
    """Offset of the segment."""
    stop: int
    """Offset of the first byte after the segment."""


def write_betons(
    work: WorkFolder, shards: dict[str, list[int]], options: BetonOptions, workers: int | None, *, pixels: bool = False
) -> dict[str, BetonEntry]:
    """Write SPLIT.beton and its index for each split, or resume after an interruption.

    If the set has no tars, each tar is removed once its images are in the .beton, which limits the disk space needed.

    Args:
        shards: split -> numbers of its shards with images.
        pixels: whether the tars store pixels instead of JPEGs.

    Returns:
        Split -> its manifest entry.
    """
    contents = {split: _compute_content(work, split, numbers, options) for split, numbers in shards.items()}
    unpublished = {
        split: content for split, content in contents.items() if not _is_published(work, split, shards[split])
    }
    todo = []
    for split, content in unpublished.items():
        with work.unfinished_beton(split).open("ab") as file:
            file.truncate(content.layout.total)
        jobs = _jobs(work, split, shards[split], content, pixels=pixels)
        todo += [job for job in jobs if not work.is_segment_done(split, job.shard)]
    with Progress("writing .beton", sum(len(job.offsets) for job in todo)) as progress:
        run_jobs(write_segment, todo, workers, progress)
    for split, content in unpublished.items():
        _publish(work, split, content)
    return {
        split: BetonEntry(
            name=work.beton(split).name,
            bytes=content.layout.total,
            mode=options.mode,
            smart_ratio=options.smart_ratio,
            segments=tuple(work.load_segment(split, shard)[0] for shard in shards[split]),
            index=work.beton_index(split).name,
            index_hash=_publish_index(work, split, shards[split], len(content.index)),
        )
        for split, content in contents.items()
    }


def _publish_index(work: WorkFolder, split: str, shards: list[int], samples: int) -> str:
    rows = (work.load_segment(split, shard)[1] for shard in shards)
    return work.publish_index(work.beton_index(split).name, samples, rows)


def _is_published(work: WorkFolder, split: str, shards: list[int]) -> bool:
    """Return whether the .beton is published. If a record is damaged, the file is moved back to be written again."""
    if not work.beton(split).exists():
        return False
    if all(work.is_segment_done(split, shard) for shard in shards):
        return True
    work.beton(split).rename(work.unfinished_beton(split))
    return False


@dataclass(frozen=True)
class _BetonContent:
    """Index and layout of a split's .beton file."""

    index: Index
    layout: BetonLayout


def _compute_content(work: WorkFolder, split: str, shards: list[int], options: BetonOptions) -> _BetonContent:
    rows = [work.load_rows(split, shard) for shard in shards]
    for number, rows_of_shard in enumerate(rows):
        rows_of_shard["shard"] = number
    index = np.concatenate(rows)
    return _BetonContent(index, compute_layout(index, options))


def _jobs(
    work: WorkFolder, split: str, shards: list[int], content: _BetonContent, *, pixels: bool
) -> Iterator[SegmentJob]:
    layout = content.layout
    decode = layout.raw & (not pixels)
    for number, shard in enumerate(shards):
        mine = content.index["shard"] == number
        start, stop = int(layout.starts[number]), int(layout.starts[number + 1])
        yield SegmentJob(work, split, shard, layout.offsets[mine], decode[mine], start, stop)


def _publish(work: WorkFolder, split: str, content: _BetonContent) -> None:
    """Write the header, metadata and allocation table, and rename the file to its final name."""
    unfinished = work.unfinished_beton(split)
    with unfinished.open("r+b", buffering=0) as file:
        write_all(file, content.layout.head(content.index))
        file.seek(int(content.layout.starts[-1]))
        write_all(file, content.layout.table())
        os.fsync(file.fileno())
    work.publish_file(unfinished, work.beton(split).name, None)


def write_segment(job: SegmentJob, report: Report) -> None:
    """Write a shard's segment of the .beton; record its hash and its index rows.

    Raises:
        ConversionFailed: the tar was damaged after it was written.
    """
    work = job.work
    tar = work.tar(job.split, job.shard)
    rows = work.load_rows(job.split, job.shard)
    digest = xxhash.xxh3_64()
    at = job.start
    beton = work.unfinished_beton(job.split)
    with explain_os_errors(beton), tar.open("rb") as source, beton.open("r+b", buffering=0) as target:
        target.seek(at)

        def write(content: bytes) -> None:
            nonlocal at
            digest.update(content)
            write_all(target, content)
            at += len(content)

        for row, offset, decode in zip(rows, job.offsets.tolist(), job.decode.tolist(), strict=True):
            data = os.pread(source.fileno(), int(row["size"]), int(row["offset"]))
            report(1, len(data))
            if xxhash.xxh3_64_intdigest(data) != row["hash"]:
                raise ConversionFailed(
                    f"{tar}: damaged since it was written; remove it and run the same command to write it again"
                )
            if decode:
                data = simplejpeg.decode_jpeg(data, "RGB").tobytes()
            write(bytes(offset - at))
            write(data)
            row["offset"], row["size"], row["hash"] = offset, len(data), xxhash.xxh3_64_intdigest(data)
        write(bytes(job.stop - at))
        os.fsync(target.fileno())
    work.save_segment(job.split, job.shard, digest.hexdigest(), rows)
    if not work.keeps_tars:
        tar.unlink()

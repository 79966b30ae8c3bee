"""Check .beton files for `pipeline verify`. The index determines all of their content except the images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from shards.errors import ShardSetError, storage_error
from shards.files.regular import open_file
from shards.format.beton import BetonLayout, BetonOptions, compute_layout
from shards.format.dataset import ShardSet
from shards.format.index import Index
from shards.format.manifest_fields import BetonEntry
from shards.workers.worker import Report

CHUNK = 2**22


@dataclass(frozen=True)
class SegmentCheck:
    """One segment (a shard's part) of a .beton file, to be checked in a worker process."""

    path: Path
    hash: str
    """Expected xxh3-64 of the segment, 16 hex digits."""
    start: int
    """Offset of the segment."""
    stop: int
    """Offset of the first byte after the segment."""
    first: int
    """Sample id of the segment's first image."""
    offsets: NDArray[np.int64]
    """int64 [samples of the segment]: offset of each image from the start of the file."""
    sizes: NDArray[np.int64]
    """int64 [samples of the segment]: stored bytes."""
    hashes: NDArray[np.uint64]
    """uint64 [samples of the segment]: xxh3-64 of the stored bytes."""


def check_beton(shard_set: ShardSet, split: str) -> tuple[list[str], list[SegmentCheck]]:
    """Check the index, size, header, metadata and allocation table of a split's .beton.

    Returns:
        One line per fault, and the checks of the segments, which the caller must run.

    Raises:
        ShardSetError: the index is damaged.
    """
    entry = shard_set.split(split)
    beton, index = entry.beton, shard_set.index(split, beton=True)
    assert beton is not None
    path = shard_set.path / beton.name
    if entry.tars:
        _compare_indexes(shard_set.path / beton.index, index, shard_set.index(split))
    layout = compute_layout(index, BetonOptions(mode=beton.mode, smart_ratio=beton.smart_ratio))
    try:
        found = path.stat().st_size
        if found != beton.bytes or found != layout.total:
            fact = ": truncated" if found < beton.bytes else ""
            return [f"{path}: expected {beton.bytes} bytes, found {found}{fact}"], []
        faults = _check_ends(path, layout, index)
    except FileNotFoundError:
        return [f"{path}: missing"], []
    except OSError as error:
        return [str(storage_error(path, error))], []
    if not (np.array_equal(index["offset"], layout.offsets) and np.array_equal(index["size"], layout.sizes)):
        where = shard_set.path / beton.index
        faults.append(f"{where}: does not match the layout of {beton.name}; convert the source again")
    return faults, _segments(path, beton, layout, index)


def check_segment(check: SegmentCheck, report: Report) -> list[str]:
    """Check every byte of a segment."""
    digest = xxhash.xxh3_64()
    try:
        with open_file(check.path) as file:
            file.seek(check.start)
            for at in range(check.start, check.stop, CHUNK):
                digest.update(file.read(min(CHUNK, check.stop - at)))
                report(0, CHUNK)
            report(len(check.offsets), 0)
            if digest.hexdigest() == check.hash:
                return []
            for i in range(len(check.offsets)):
                file.seek(int(check.offsets[i]))
                if xxhash.xxh3_64_intdigest(file.read(int(check.sizes[i]))) != check.hashes[i]:
                    where = f"offset {check.offsets[i]}, sample {check.first + i}"
                    return [f"{check.path}: {where}: the image differs from the one that was written"]
    except OSError as error:
        return [str(storage_error(check.path, error))]
    return [f"{check.path}: offset {check.start}: damaged between images in the next {check.stop - check.start} bytes"]


def _check_ends(path: Path, layout: BetonLayout, index: Index) -> list[str]:
    faults = []
    with open_file(path) as file:
        if file.read(int(layout.starts[0])) != layout.head(index):
            faults.append(f"{path}: offset 0: damaged header or metadata")
        file.seek(int(layout.starts[-1]))
        if file.read() != layout.table():
            faults.append(f"{path}: offset {layout.starts[-1]}: damaged allocation table")
    return faults


def _compare_indexes(path: Path, beton: Index, tars: Index) -> None:
    for field in ("label", "height", "width", "orientation", "repaired"):
        bad = beton[field] != tars[field]
        if bad.any():
            row = int(bad.argmax())
            raise ShardSetError(
                f"{path}: row {row} has {field} {beton[field][row]}, but {tars[field][row]} in the index of the tars; "
                "convert the source again"
            )


def _segments(path: Path, beton: BetonEntry, layout: BetonLayout, index: Index) -> list[SegmentCheck]:
    firsts = np.searchsorted(index["shard"], np.arange(len(beton.segments) + 1))
    checks = []
    for i, digest in enumerate(beton.segments):
        mine = slice(int(firsts[i]), int(firsts[i + 1]))
        checks.append(
            SegmentCheck(
                path=path,
                hash=digest,
                start=int(layout.starts[i]),
                stop=int(layout.starts[i + 1]),
                first=mine.start,
                offsets=layout.offsets[mine],
                sizes=layout.sizes[mine],
                hashes=np.array(index["hash"][mine]),
            )
        )
    return checks

"""The part of `pipeline verify` that knows .beton files: all of one but the images follows from the index."""

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
    """One shard's part of the file, to be checked in a worker process."""

    path: Path
    hash: str
    start: int
    stop: int
    """First byte of the part, and of what follows it."""
    first: int
    """Sample id of its first image."""
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    hashes: NDArray[np.uint64]


def check_frame(shard_set: ShardSet, split: str) -> tuple[list[str], list[SegmentCheck]]:
    """Check the split's .beton: its index, its size, its head and its table.

    Returns:
        A line per fault, and the checks of what is between head and table, which are left to do.

    Raises:
        ShardSetError: its index is damaged.
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
            return [f"{path}: {beton.bytes} bytes expected, {found} found{fact}"], []
        faults = _check_ends(path, layout, index)
    except FileNotFoundError:
        return [f"{path}: missing"], []
    except OSError as error:
        return [str(storage_error(path, error))], []
    if not (np.array_equal(index["offset"], layout.offsets) and np.array_equal(index["size"], layout.sizes)):
        where = shard_set.path / beton.index
        faults.append(f"{where}: not where the images of {beton.name} are; shard the source again")
    return faults, _segments(path, beton, layout, index)


def check_segment(check: SegmentCheck, report: Report) -> list[str]:
    """Check a shard's part, byte for byte."""
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
                    return [f"{check.path}: {where}: its bytes are not those that were written"]
    except OSError as error:
        return [str(storage_error(check.path, error))]
    return [f"{check.path}: offset {check.start}: damaged in the {check.stop - check.start} bytes from there on"]


def _check_ends(path: Path, layout: BetonLayout, index: Index) -> list[str]:
    faults = []
    with open_file(path) as file:
        if file.read(int(layout.starts[0])) != layout.head(index):
            faults.append(f"{path}: offset 0: its header or its metadata is damaged")
        file.seek(int(layout.starts[-1]))
        if file.read() != layout.table():
            faults.append(f"{path}: offset {layout.starts[-1]}: its allocation table is damaged")
    return faults


def _compare_indexes(path: Path, beton: Index, tars: Index) -> None:
    for field in ("label", "height", "width", "orientation", "repaired"):
        bad = beton[field] != tars[field]
        if bad.any():
            row = int(bad.argmax())
            raise ShardSetError(
                f"{path}: row {row} has {field} {beton[field][row]}, the index of the tars {tars[field][row]}; "
                "shard the source again"
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

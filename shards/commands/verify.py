"""`pipeline verify`: check every byte of a set.

The index determines the offset and the content of every header, image, label and padding of a tar. Each fault
is therefore reported with its shard, offset and key.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import numpy as np
import xxhash

from shards.commands.verify_beton import SegmentCheck, check_beton, check_segment
from shards.errors import ShardSetError, storage_error
from shards.files.regular import open_file
from shards.format.dataset import ShardSet
from shards.format.index import Index
from shards.format.manifest import MANIFEST_NAME, REJECTS_NAME, Manifest
from shards.format.manifest_fields import ShardEntry
from shards.format.tar import BLOCK, END, dali_index, header, image_suffix, index_line, padding
from shards.images.accept import exceeded_limit
from shards.images.jpeg import NotAJpeg, parse_header
from shards.images.ppm import ppm_header
from shards.progress import Progress
from shards.workers.pool import run_jobs
from shards.workers.worker import Report

CHUNK = 2**22


@dataclass(frozen=True)
class ShardCheck:
    """One shard to be checked in a worker process."""

    path: Path
    entry: ShardEntry
    rows: Index
    """`INDEX_DTYPE` [samples of the shard]."""
    indexed_in_place: bool
    """Whether the tar was indexed in place, so that only the offsets of its images are known."""
    pixels: bool
    """Whether the images are pixels (KEY.ppm) instead of JPEGs."""


def verify(path: Path, workers: int | None = None) -> list[str]:
    """Check all files of a set.

    Returns:
        One line per fault, which names the file; empty if there are no faults.

    Raises:
        ShardSetError: there is no set in this folder, or its manifest is damaged.
        StorageFailed: the manifest cannot be read.
    """
    shard_set = ShardSet(path)
    manifest = shard_set.manifest
    faults = _check_manifest(path, manifest)
    checks: list[ShardCheck | SegmentCheck] = []
    for split, entry in manifest.splits.items():
        try:
            if entry.tars:
                checks += _shard_checks(shard_set, split)
            if entry.beton:
                found, segments = check_beton(shard_set, split)
                faults += found
                checks += segments
        except ShardSetError as error:
            faults.append(str(error))
    samples = sum(
        entry.samples * (int(entry.tars) + int(entry.beton is not None)) for entry in manifest.splits.values()
    )
    with Progress("verifying", samples) as progress:
        for found in run_jobs(_check, checks, workers, progress):
            faults += found
    return faults


def _check(check: ShardCheck | SegmentCheck, report: Report) -> list[str]:
    return check_segment(check, report) if isinstance(check, SegmentCheck) else check_shard(check, report)


def _check_manifest(path: Path, manifest: Manifest) -> list[str]:
    faults = []
    if (path / MANIFEST_NAME).read_bytes() != manifest.dumps().encode():
        faults.append(f"{path / MANIFEST_NAME}: modified since it was written: same content, other formatting")
    rejects, expected = path / REJECTS_NAME, manifest.made.get("rejects_hash")
    try:
        with open_file(rejects) as file:
            found = _hash(file)
    except FileNotFoundError:
        found = None
    except OSError as error:
        return [*faults, str(storage_error(rejects, error))]
    except ShardSetError as error:
        return [*faults, str(error)]
    if found != expected:
        faults.append(f"{rejects}: {'missing' if found is None else 'not the list that the manifest describes'}")
    return faults


def _hash(file: FileIO) -> str:
    digest = xxhash.xxh3_64()
    while chunk := file.read(CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def _shard_checks(shard_set: ShardSet, split: str) -> list[ShardCheck]:
    """Return one check per tar of a split, with the tar's index rows."""
    path, index, stored = shard_set.path, shard_set.index(split), shard_set.split(split)
    indexed_in_place = not shard_set.manifest.shuffled
    ends = np.cumsum(shard_set.shard_samples(split)).tolist()
    return [
        ShardCheck(path / entry.name, entry, index[end - entry.samples : end], indexed_in_place, stored.pixels)
        for entry, end in zip(stored.shards, ends, strict=True)
    ]


def check_shard(check: ShardCheck, report: Report) -> list[str]:
    """Check every byte of one tar and, if it has no faults, its DALI index."""
    path, entry = check.path, check.entry
    try:
        found = path.stat().st_size
        if found != entry.bytes:
            faults = [f"{path}: expected {entry.bytes} bytes, found {found}"]
            if found < entry.bytes:
                faults[0] += ": truncated"
            return faults
        with open_file(path) as file:
            if check.indexed_in_place:
                return _check_indexed_tar(file, check, report)
            faults, lines = _walk(file, check, report)
    except FileNotFoundError:
        return [f"{path}: missing"]
    except OSError as error:
        return [str(storage_error(path, error))]
    except ShardSetError as error:
        return [str(error)]
    return faults or _check_dali_index(path.with_suffix(".idx"), lines)


def _walk(file: FileIO, check: ShardCheck, report: Report) -> tuple[list[str], list[str]]:
    """Read a tar from its first byte to its last; return its faults and the expected lines of its DALI index."""
    path, entry, suffix = check.path, check.entry, image_suffix(pixels=check.pixels)
    digest = xxhash.xxh3_64()
    faults: list[str] = []
    lines: list[str] = []
    keys: set[str] = set()

    def read(size: int) -> bytes:
        content = file.read(size)
        digest.update(content)
        return content

    for row in check.rows:
        ppm = _ppm_header(check, row)
        at, size, label = file.tell(), len(ppm) + int(row["size"]), b"%d" % row["label"]
        head = read(BLOCK)
        name = _name(head)
        key = name.removesuffix(f".{suffix}")
        start = read(len(ppm))
        image = read(size - len(ppm))
        rest = read(-size % BLOCK + BLOCK + len(label) + -len(label) % BLOCK)
        where = f"{path}: offset {at}, key '{key}'"
        if at + BLOCK + len(ppm) != row["offset"]:
            faults.append(f"{where}: according to the index, this image is at offset {row['offset']}")
        elif key == name or head != header(name, size):
            faults.append(f"{where}: damaged tar header")
        elif start != ppm:
            faults.append(f"{where}: damaged header of a PPM")
        elif xxhash.xxh3_64_intdigest(image) != row["hash"]:
            faults.append(f"{where}: the image differs from the one that was written")
        elif rest != padding(size) + header(f"{key}.cls", len(label)) + label + padding(len(label)):
            faults.append(f"{where}: the label member is damaged")
        elif key in keys:
            faults.append(f"{where}: duplicate key")
        elif not check.pixels and not _fits(image, row):
            faults.append(f"{where}: height, width or orientation differs from the index")
        elif not check.pixels and (excess := exceeded_limit(image)) is not None:
            faults.append(f"{where}: 'pipeline shard' would reject this image: {excess}")
        keys.add(key)
        lines.append(index_line(key, suffix, at + BLOCK, size, len(label)))
        report(1, size)
    if read(len(END) + 1) != END:
        faults.append(f"{path}: offset {entry.bytes - len(END)}: damaged end of archive")
    if not faults and digest.hexdigest() != entry.hash:
        faults.append(f"{path}: expected hash {entry.hash}, found {digest.hexdigest()}")
    return faults, lines


def _check_indexed_tar(file: FileIO, check: ShardCheck, report: Report) -> list[str]:
    """Check a tar that was indexed in place: its hash, and the images at the offsets in the index."""
    path, entry = check.path, check.entry
    digest = _hash(file)
    faults = []
    for row in check.rows:
        ppm = _ppm_header(check, row)
        at, size = int(row["offset"]), int(row["size"])
        image = os.pread(file.fileno(), size, at)
        if xxhash.xxh3_64_intdigest(image) != row["hash"]:
            key = _name(os.pread(file.fileno(), BLOCK, max(0, at - len(ppm) - BLOCK)))
            faults.append(f"{path}: offset {at}, '{key}': the image differs from the indexed one")
        elif ppm != os.pread(file.fileno(), len(ppm), max(0, at - len(ppm))):
            faults.append(f"{path}: offset {at}: height or width differs from the index")
        elif not check.pixels and not _fits(image, row):
            faults.append(f"{path}: offset {at}: height, width or orientation differs from the index")
        elif not check.pixels and (excess := exceeded_limit(image)) is not None:
            faults.append(f"{path}: offset {at}: 'pipeline index' would reject it: {excess}")
        report(1, size)
    if not faults and digest != entry.hash:
        faults.append(f"{path}: expected hash {entry.hash}, found {digest}: damaged outside its images")
    return faults


def _ppm_header(check: ShardCheck, row: np.void) -> bytes:
    """Return the bytes between the start of an image's tar member and its pixels; none for a JPEG."""
    return ppm_header(int(row["height"]), int(row["width"])) if check.pixels else b""


def _name(head: bytes) -> str:
    return head[:100].rstrip(b"\0").decode("latin-1")


def _fits(image: bytes, row: np.void) -> bool:
    try:
        found = parse_header(image)
    except NotAJpeg:
        return False
    return (found.height, found.width, found.orientation) == (row["height"], row["width"], row["orientation"])


def _check_dali_index(path: Path, lines: list[str]) -> list[str]:
    expected = dali_index(lines)
    try:
        with open_file(path) as file:
            content = file.read(len(expected) + 1)
    except FileNotFoundError:
        return [f"{path}: missing"]
    except OSError as error:
        return [str(storage_error(path, error))]
    except ShardSetError as error:
        return [str(error)]
    return [] if content == expected else [f"{path}: does not match its tar"]

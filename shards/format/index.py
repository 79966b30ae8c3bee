"""The split index: one packed row per sample.

A sample's *id* is its row number: the order of the shards and of the samples inside them.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from io import FileIO
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from shards.errors import ShardSetError
from shards.files.durable import durable_file, write_all
from shards.files.regular import open_file
from shards.files.retry import read_with_retries
from shards.images.limits import MAX_ENCODED, MAX_PIXELS, MAX_SIDE

INDEX_DTYPE = np.dtype(
    [
        ("offset", "<u8"),  # of the image's first byte in the shard's file
        ("hash", "<u8"),  # xxh3-64 of the stored bytes
        ("shard", "<u4"),  # place in the manifest's list of the split
        ("size", "<u4"),  # stored bytes
        ("label", "<u4"),
        ("height", "<u2"),  # of the decoded image, before any EXIF rotation
        ("width", "<u2"),
        ("orientation", "u1"),  # EXIF orientation 1..8 (1 when absent); recorded, never applied
        ("repaired", "u1"),  # 1 when the bytes were re-encoded because the source's were not plain RGB/grey JPEG
    ]
)

Index = NDArray[np.void]

# What an image may be. shards.images.accept rejects all others.

PRIVATE_BYTES = 1 << 30
"""Indexes up to this size (31 million samples) are copied into the process's memory, larger ones are mapped."""

_HEADER_BYTES = 384  # .npy format 1.0 asks for a multiple of 64; the longest header takes 283 bytes
_CHUNK = 1 << 22
_CHUNK_ROWS = 1 << 14  # 560 kB of rows at a time stay in the processor's cache
_REMEDY = "copy it again, or shard the source again"


def index_bytes(samples: int) -> int:
    """Size of the index file of a split of `samples` samples, in bytes."""
    return _HEADER_BYTES + samples * INDEX_DTYPE.itemsize


def open_index(path: Path, *, samples: int, digest: str) -> Index:
    """Read an index and compare its hash, of the bytes that are then used.

    A copy in private memory makes whatever happens to the file later harmless. One of more than `PRIVATE_BYTES` is
    mapped instead: there, a file that is edited or truncated in place after this check changes the rows, or ends the
    process by SIGBUS.

    Args:
        samples: rows that the manifest promises.
        digest: xxh3-64 of the file, 16 hex digits.

    Returns:
        Read-only `INDEX_DTYPE` [samples].

    Raises:
        ShardSetError: missing, damaged, of another layout or length, or not the index that the manifest describes.
        StorageFailed: it cannot be read.
    """
    size = index_bytes(samples)

    def read() -> NDArray[np.uint8]:
        with open_file(path) as file:
            found = file.seek(0, 2)
            if found != size:
                raise ShardSetError(f"{path}: damaged index: {size:,} bytes expected, {found:,} found; {_REMEDY}")
            return _read(file, size) if size <= PRIVATE_BYTES else _map(file, size)

    content = read_with_retries(path, read, remedy=_REMEDY)
    hasher = xxhash.xxh3_64()
    for at in range(0, len(content), _CHUNK):
        hasher.update(content[at : at + _CHUNK].data)
    if hasher.hexdigest() != digest:
        raise ShardSetError(
            f"{path}: damaged index, or that of another set: hash {digest} expected, "
            f"{hasher.hexdigest()} found; {_REMEDY}"
        )
    if content[:_HEADER_BYTES].tobytes() != _npy_header(samples):
        raise ShardSetError(f"{path}: an index of another layout; {_REMEDY}")
    rows = content[_HEADER_BYTES:].view(INDEX_DTYPE)
    rows.flags.writeable = False
    return rows


def check_rows(
    path: Path,
    index: Index,
    *,
    samples: NDArray[np.int64],
    sizes: NDArray[np.int64],
    classes: int,
    in_one_file: bool = False,
    pixels: bool = False,
) -> None:
    """Check every row against the manifest, with memory for some thousand rows.

    Args:
        path: of the index, for messages.
        samples: int64 [shards]: samples of each shard.
        sizes: int64 [shards]: bytes of the file that each shard is in.
        classes: of the set.
        in_one_file: all shards are in one file, one image after the other.
        pixels: all images are stored as pixels, uint8 [height, width, 3].

    Raises:
        ShardSetError: names the first bad row, its field, what was found and what was expected.
    """
    ends = np.cumsum(samples)
    end_before = np.zeros(1, np.uint64)
    for start in range(0, len(index), _CHUNK_ROWS):
        rows = index[start : start + _CHUNK_ROWS]
        shard, limit = _shards_of_rows(start, len(rows), ends, sizes)
        offset, size = rows["offset"].astype(np.uint64), rows["size"].astype(np.uint64)
        height, width = rows["height"].astype(np.uint32), rows["width"].astype(np.uint32)
        area = height * width
        # Unsigned numbers: 0 - 1 is beyond every limit. The offset's check assumes that the size's has passed.
        checks = [
            ("shard", rows["shard"] != shard, "the shard that the manifest counts it to"),
            ("label", rows["label"] >= classes, f"less than {classes:,}, the number of classes"),
            ("size", size - 1 >= np.minimum(limit, MAX_ENCODED), "1 or more, and no more than its file or 512 MiB"),
            ("offset", offset > limit - size, "such that the image ends inside its file"),
            ("height", height - 1 >= MAX_SIDE, f"1 to {MAX_SIDE:,}"),
            ("width", width - 1 >= MAX_SIDE, f"1 to {MAX_SIDE:,}"),
            ("width", area > MAX_PIXELS, f"no more than {MAX_PIXELS:,} pixels in all"),
            ("orientation", rows["orientation"] - np.uint8(1) > 7, "1 to 8"),
            ("repaired", rows["repaired"] > 1, "0 or 1"),
        ]
        if in_one_file:
            image_ends = np.concatenate([end_before, offset + size])
            end_before = image_ends[-1:]
            checks.append(("offset", offset < image_ends[:-1], "no less than the end of the image before"))
        if pixels:
            checks.append(("size", size != 3 * area, "3 bytes for each pixel"))
        for field, bad, expected in checks:
            if bad.any():
                row = int(bad.argmax())
                raise ShardSetError(
                    f"{path}: damaged index: row {start + row} has {field} {rows[field][row]}, expected {expected}; "
                    f"{_REMEDY}"
                )


def write_index(path: Path, samples: int, shards: Iterable[Index]) -> str:
    """Write a split's index, shard by shard, without holding more than one in memory.

    Args:
        samples: rows in all.
        shards: rows of each shard, in order; their `shard` is set here.

    Returns:
        xxh3-64 of the file, 16 hex digits.
    """
    digest = xxhash.xxh3_64()
    with durable_file(path) as file:

        def write(content: bytes) -> None:
            digest.update(content)
            write_all(file, content)

        write(_npy_header(samples))
        for place, rows in enumerate(shards):
            rows["shard"] = place
            write(rows.tobytes())
    return digest.hexdigest()


def _shards_of_rows(
    start: int, count: int, ends: NDArray[np.int64], sizes: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """Of rows [start, start + count): the shard that each belongs to, and the bytes of that shard's file."""
    first, last = np.searchsorted(ends, [start, start + count - 1], side="right")
    shards = np.arange(first, last + 1)
    bounds = np.concatenate([[start], ends[first:last], [start + count]])
    repeats = np.diff(bounds)
    return np.repeat(shards, repeats), np.repeat(sizes[shards].astype(np.uint64), repeats)


def _read(file: FileIO, size: int) -> NDArray[np.uint8]:
    content = np.empty(size, np.uint8)
    file.seek(0)
    done = 0
    while done < size:
        got = file.readinto(content[done:])  # type: ignore[arg-type]
        if not got:
            raise ShardSetError(f"{file.name}: ends at byte {done:,} of {size:,} while it is read; {_REMEDY}")
        done += got
    return content


def _map(file: FileIO, size: int) -> NDArray[np.uint8]:
    return np.frombuffer(mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ), np.uint8)


def _npy_header(samples: int) -> bytes:
    """Header (.npy format 1.0) of a file of that many rows. Of our own making: numpy's depends on its version."""
    magic = b"\x93NUMPY\x01\x00" + (_HEADER_BYTES - 10).to_bytes(2, "little")
    fields = {"descr": INDEX_DTYPE.descr, "fortran_order": False, "shape": (samples,)}
    return magic + repr(fields).encode().ljust(_HEADER_BYTES - 11) + b"\n"

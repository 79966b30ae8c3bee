"""The index of a split: one packed row per sample.

The sample id is the row number. Rows are in the order of the shards and of the samples in each shard.
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
        ("offset", "<u8"),  # offset of the image's first byte in the file of its shard (pixels: of the first pixel)
        ("hash", "<u8"),  # xxh3-64 of the stored bytes
        ("shard", "<u4"),  # position of the shard in the split's list in the manifest
        ("size", "<u4"),  # number of stored bytes
        ("label", "<u4"),
        ("height", "<u2"),  # height of the decoded image, before any EXIF rotation
        ("width", "<u2"),
        ("orientation", "u1"),  # EXIF orientation, 1 to 8 (1 if absent); recorded, but never applied
        ("repaired", "u1"),  # 1: re-encoded, because the source image was not a plain RGB or gray JPEG
    ]
)

Index = NDArray[np.void]

PRIVATE_BYTES = 1 << 30
"""Indexes of up to this many bytes (31 million samples) are read into memory; larger ones are memory-mapped."""

_HEADER_BYTES = 384  # .npy format 1.0 requires a multiple of 64; the longest header has 283 bytes
_CHUNK = 1 << 22
_CHUNK_ROWS = 1 << 14  # 560 kB per chunk, which fits in the CPU cache
_REMEDY = "copy it again, or convert the source again"


def index_bytes(samples: int) -> int:
    """Return the size of the index file of a split with `samples` samples, in bytes."""
    return _HEADER_BYTES + samples * INDEX_DTYPE.itemsize


def open_index(path: Path, *, samples: int, digest: str) -> Index:
    """Read an index and check its hash.

    The index is read into private memory, so that later changes of the file have no effect. An index of more than
    `PRIVATE_BYTES` is memory-mapped: if such a file is edited or truncated after this check, the rows change or SIGBUS
    kills the process.

    Args:
        samples: expected number of rows.
        digest: expected xxh3-64 of the file, 16 hex digits.

    Returns:
        Read-only `INDEX_DTYPE` [samples].

    Raises:
        ShardSetError: the file is missing or damaged, or has an unexpected format, length or hash.
        StorageFailed: the file cannot be read.
    """
    size = index_bytes(samples)

    def read() -> NDArray[np.uint8]:
        with open_file(path) as file:
            found = file.seek(0, 2)
            if found != size:
                raise ShardSetError(f"{path}: damaged index: expected {size:,} bytes, found {found:,}; {_REMEDY}")
            return _read(file, size) if size <= PRIVATE_BYTES else _map(file, size)

    content = read_with_retries(path, read, remedy=_REMEDY)
    hasher = xxhash.xxh3_64()
    for at in range(0, len(content), _CHUNK):
        hasher.update(content[at : at + _CHUNK].data)
    if hasher.hexdigest() != digest:
        raise ShardSetError(
            f"{path}: damaged index, or the index of a different set: expected hash {digest}, found "
            f"{hasher.hexdigest()}; {_REMEDY}"
        )
    if content[:_HEADER_BYTES].tobytes() != _npy_header(samples):
        raise ShardSetError(f"{path}: the index has an unknown format; {_REMEDY}")
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
    """Check every row against the manifest, in chunks that need little memory.

    Args:
        path: path of the index, for messages.
        samples: int64 [shards]: number of samples of each shard.
        sizes: int64 [shards]: size in bytes of the file that contains each shard.
        classes: number of classes.
        in_one_file: all shards are in one file, one image after the other.
        pixels: all images are stored as pixels, uint8 [height, width, 3].

    Raises:
        ShardSetError: a row is invalid; the message names the first one, its field, the found and expected values.
    """
    ends = np.cumsum(samples)
    end_before = np.zeros(1, np.uint64)
    for start in range(0, len(index), _CHUNK_ROWS):
        rows = index[start : start + _CHUNK_ROWS]
        shard, limit = _shards_of_rows(start, len(rows), ends, sizes)
        offset, size = rows["offset"].astype(np.uint64), rows["size"].astype(np.uint64)
        height, width = rows["height"].astype(np.uint32), rows["width"].astype(np.uint32)
        area = height * width
        # In unsigned arithmetic, 0 - 1 exceeds every limit. The check of the offset is only correct for a valid size.
        checks = [
            ("shard", rows["shard"] != shard, "the shard to which the manifest assigns this row"),
            ("label", rows["label"] >= classes, f"less than the number of classes, {classes:,}"),
            ("size", size - 1 >= np.minimum(limit, MAX_ENCODED), "1 or more, at most 512 MiB and the size of its file"),
            ("offset", offset > limit - size, "an offset such that the image ends inside its file"),
            ("height", height - 1 >= MAX_SIDE, f"1 to {MAX_SIDE:,}"),
            ("width", width - 1 >= MAX_SIDE, f"1 to {MAX_SIDE:,}"),
            ("width", area > MAX_PIXELS, f"at most {MAX_PIXELS:,} pixels in total"),
            ("orientation", rows["orientation"] - np.uint8(1) > 7, "1 to 8"),
            ("repaired", rows["repaired"] > 1, "0 or 1"),
        ]
        if in_one_file:
            image_ends = np.concatenate([end_before, offset + size])
            end_before = image_ends[-1:]
            checks.append(("offset", offset < image_ends[:-1], "at least the end of the previous image"))
        if pixels:
            checks.append(("size", size != 3 * area, "3 bytes per pixel"))
        for field, bad, expected in checks:
            if bad.any():
                row = int(bad.argmax())
                raise ShardSetError(
                    f"{path}: damaged index: row {start + row} has {field} {rows[field][row]}, expected {expected}; "
                    f"{_REMEDY}"
                )


def write_index(path: Path, samples: int, shards: Iterable[Index]) -> str:
    """Write a split's index, with the rows of only one shard in memory at a time.

    Args:
        samples: total number of rows.
        shards: rows of each shard, in order; their field `shard` is set here.

    Returns:
        xxh3-64 of the file, 16 hex digits.
    """
    digest = xxhash.xxh3_64()
    with durable_file(path) as file:

        def write(content: bytes) -> None:
            digest.update(content)
            write_all(file, content)

        write(_npy_header(samples))
        for number, rows in enumerate(shards):
            rows["shard"] = number
            write(rows.tobytes())
    return digest.hexdigest()


def _shards_of_rows(
    start: int, count: int, ends: NDArray[np.int64], sizes: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """Return, for each of the rows [start, start + count), its shard and the size of that shard's file."""
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
            raise ShardSetError(f"{file.name}: truncated at byte {done:,} of {size:,} during reading; {_REMEDY}")
        done += got
    return content


def _map(file: FileIO, size: int) -> NDArray[np.uint8]:
    return np.frombuffer(mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ), np.uint8)


def _npy_header(samples: int) -> bytes:
    """Return the .npy header (format 1.0). NumPy does not write it, because NumPy's header depends on its version."""
    magic = b"\x93NUMPY\x01\x00" + (_HEADER_BYTES - 10).to_bytes(2, "little")
    fields = {"descr": INDEX_DTYPE.descr, "fortran_order": False, "shape": (samples,)}
    return magic + repr(fields).encode().ljust(_HEADER_BYTES - 11) + b"\n"

"""Listings of the images of a source: names, locations, sizes, and labels, before any image is decoded.

A listing is stored in flat arrays on disk, because a large source has millions of images and several processes use the
same listing: a worker maps only the rows of its shard.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from shards.files.durable import durable_write, save_array
from shards.redact import display_name

LOOSE = 2**64 - 1
"""Offset of an entry that is a file in a folder, not a byte range of an archive."""

ROW = np.dtype(
    [
        ("name_start", "<u8"),
        ("name_length", "<u4"),
        ("container", "<u4"),
        ("offset", "<u8"),
        ("size", "<u8"),
        ("mtime", "<i8"),  # modification time of the file in seconds since 1970; 0 for a byte range of an archive
        ("label", "<u4"),
        ("ambiguous", "u1"),  # 1 if another entry of the split would have the same key
    ]
)
Rows = NDArray[np.void]
_ROWS_AT_ONCE = 1024
_SUFFIXES = (".rows.npy", ".names.npy", ".places.json")

# A key is the part of a member's name before '.jpg'. Readers split names at the first dot and indexes at white space,
# and plain ustar headers hold 100 ASCII characters.
MAX_KEY = 95
_KEY_BYTES = bytes(c if chr(c).isascii() and (chr(c).isalnum() or chr(c) in "-_/") else ord("_") for c in range(256))


@dataclass(frozen=True, slots=True)
class Container:
    """A folder or an archive of images, with its state when the images were listed."""

    path: Path
    size: int
    """Size of the archive in bytes."""
    mtime: int
    """Modification time in whole seconds since 1970: the precision below a second differs between file systems."""

    @classmethod
    def of(cls, path: Path) -> Container:
        """Return the state of `path`. Call this before listing it, so that later changes are detected."""
        status = path.stat()
        return cls(path, status.st_size, int(status.st_mtime))

    def is_still(self, status: os.stat_result) -> bool:
        """Return whether the archive still has the same size and modification time."""
        return (status.st_size, int(status.st_mtime)) == (self.size, self.mtime)


@dataclass(frozen=True)
class Entry:
    """One image of a source."""

    name: bytes
    """CLASS/FILE in every layout, so that the same images give the same shards from a folder and from an archive."""
    container: Container
    offset: int | None
    """Offset of the first byte in the archive; None if the container is a folder."""
    size: int
    mtime: int
    label: int
    ambiguous: bool

    @property
    def key(self) -> str:
        location = b"" if self.offset is None else b"%s %d" % (os.fsencode(self.container.path.name), self.offset)
        return sample_key(self.name, self.name + location if self.ambiguous else None)

    @property
    def path(self) -> str:
        """Location of the image, for messages."""
        if self.offset is None:
            return display_name(bytes(self.container.path / _basename(self.name)))
        return f"{self.container.path}[{display_name(self.name)}]"


class Listing:
    """Images of one split.

    Args:
        rows: `ROW` [images].
        names: concatenated names of all images, uint8 [bytes].
        containers: folders and archives that `rows["container"]` refers to.
    """

    def __init__(self, rows: Rows, names: NDArray[np.uint8], containers: list[Container]) -> None:
        self.rows, self.names, self.containers = rows, names, containers
        self._text = np.asarray(names).data  # slicing a memoryview is faster than slicing an array

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, i: int) -> bytes:
        start = int(self.rows["name_start"][i])
        return self._text[start : start + int(self.rows["name_length"][i])].tobytes()

    def entries(self, start: int, stop: int) -> Iterator[Entry]:
        for first in range(start, stop, _ROWS_AT_ONCE):
            rows = self.rows[first : min(first + _ROWS_AT_ONCE, stop)].tolist()
            for name_start, name_length, container, offset, size, mtime, label, ambiguous in rows:
                yield Entry(
                    name=self._text[name_start : name_start + name_length].tobytes(),
                    container=self.containers[container],
                    offset=None if offset == LOOSE else offset,
                    size=size,
                    mtime=mtime,
                    label=label,
                    ambiguous=bool(ambiguous),
                )

    def save(self, stem: Path) -> list[Path]:
        """Write the listing and return the paths of the files."""
        rows, names, containers_file = (stem.with_suffix(suffix) for suffix in _SUFFIXES)
        save_array(rows, self.rows)
        save_array(names, self.names)
        # Bytes of paths that are not UTF-8 are written as escaped surrogates, \udcXX.
        containers = [(str(one.path), one.size, one.mtime) for one in self.containers]
        durable_write(containers_file, json.dumps(containers).encode())
        return [rows, names, containers_file]

    @classmethod
    def load(cls, stem: Path) -> Listing:
        """Map the files of a listing into memory."""
        rows, names, containers_file = (stem.with_suffix(suffix) for suffix in _SUFFIXES)
        containers = json.loads(containers_file.read_bytes())
        return cls(
            rows=np.load(rows, mmap_mode="r"),
            names=np.load(names, mmap_mode="r"),
            containers=[Container(Path(path), size, mtime) for path, size, mtime in containers],
        )


class ListingBuilder:
    """Builds a listing, one container at a time, without an object per image."""

    def __init__(self) -> None:
        self._names = bytearray()
        self._rows: list[Rows] = []
        self._containers: list[Container] = []

    def add_files(self, folder: Container, found: Sequence[tuple[bytes, int, int, int]]) -> None:
        """Add the files of a folder: (name, size, modification time in seconds, label) of each."""
        names, sizes, mtimes, labels = zip(*found, strict=True) if found else ((), (), (), ())
        rows = self._add(folder, names)
        rows["offset"] = LOOSE
        rows["size"] = sizes
        rows["mtime"] = mtimes
        rows["label"] = labels

    def add_ranges(self, archive: Container, found: Sequence[tuple[bytes, int, int, int]]) -> None:
        """Add byte ranges of an archive: (name, offset, size, label) of each."""
        names, offsets, sizes, labels = zip(*found, strict=True) if found else ((), (), (), ())
        rows = self._add(archive, names)
        rows["offset"] = offsets
        rows["size"] = sizes
        rows["label"] = labels

    def _add(self, container: Container, names: Sequence[bytes]) -> Rows:
        if not self._containers or self._containers[-1] != container:
            self._containers.append(container)
        rows = np.zeros(len(names), dtype=ROW)
        lengths = np.array([len(name) for name in names], dtype=np.int64)
        rows["name_length"] = lengths
        rows["name_start"] = len(self._names) + np.cumsum(lengths) - lengths
        rows["container"] = len(self._containers) - 1
        self._names += b"".join(names)
        self._rows.append(rows)
        return rows

    def build(self) -> Listing:
        rows = np.concatenate(self._rows) if self._rows else np.zeros(0, dtype=ROW)
        listing = Listing(rows, np.frombuffer(bytes(self._names), dtype=np.uint8), self._containers)
        _mark_ambiguous(listing)
        return listing


def sample_key(name: bytes, unique: bytes | None = None) -> str:
    """Return the key of an image in a shard: its class and file name, in letters, digits, '-', '_', and '/' only.

    Keys that are too long are truncated and end with a hash of the name.

    Args:
        unique: bytes whose hash is appended to distinguish several images that would have the same key.
    """
    base = name.rfind(b"/") + 1
    dot = name.rfind(b".")
    stem = name[:dot] if dot > base else name
    key = stem.translate(_KEY_BYTES).decode("ascii")
    if unique is None and len(key) <= MAX_KEY:
        return key
    suffix = "-" + xxhash.xxh3_64_hexdigest(unique or name)
    return key[: MAX_KEY - len(suffix)] + suffix


def _basename(name: bytes) -> str:
    return name[name.rfind(b"/") + 1 :].decode("utf-8", errors="surrogateescape")


def _mark_ambiguous(listing: Listing) -> None:
    keys = np.fromiter(
        (xxhash.xxh3_64_intdigest(sample_key(listing.name(i)).encode()) for i in range(len(listing))),
        dtype=np.uint64,
        count=len(listing),
    )
    _, which, count = np.unique(keys, return_inverse=True, return_counts=True)
    listing.rows["ambiguous"] = count[which] > 1

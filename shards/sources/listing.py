"""What a source holds, before any of it is opened as an image: names, places, sizes and labels.

A listing lives in flat arrays and on disk, because a large source has millions of entries and several processes work
from the same list: a worker maps the few rows of its shard and never holds the rest.
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
"""In place of an offset: the container is a folder, and the entry a file in it, not a range of bytes in an archive."""

ROW = np.dtype(
    [
        ("name_start", "<u8"),
        ("name_length", "<u4"),
        ("container", "<u4"),
        ("offset", "<u8"),
        ("size", "<u8"),
        ("mtime", "<i8"),  # of the file, in whole seconds since 1970; 0 for a range of an archive
        ("label", "<u4"),
        ("ambiguous", "u1"),  # another entry of the split would have the same key
    ]
)
Rows = NDArray[np.void]
_ROWS_AT_ONCE = 1024
_SUFFIXES = (".rows.npy", ".names.npy", ".places.json")

# A key is what stands before '.jpg' in the tar. Readers split names at the first dot and indexes at white space, and
# plain ustar headers hold 100 characters of ASCII.
MAX_KEY = 95
_KEY_BYTES = bytes(c if chr(c).isascii() and (chr(c).isalnum() or chr(c) in "-_/") else ord("_") for c in range(256))


@dataclass(frozen=True, slots=True)
class Container:
    """A folder or an archive that holds images, as it was when they were listed."""

    path: Path
    size: int
    """Bytes of the archive."""
    mtime: int
    """Whole seconds since 1970: file systems and hosts differ in what they know beyond that."""

    @classmethod
    def of(cls, path: Path) -> Container:
        """Describe `path`; taken before it is listed, so that a change meanwhile shows."""
        status = path.stat()
        return cls(path, status.st_size, int(status.st_mtime))

    def is_still(self, status: os.stat_result) -> bool:
        """Whether the archive has the size and the time of last change that it had."""
        return (status.st_size, int(status.st_mtime)) == (self.size, self.mtime)


@dataclass(frozen=True)
class Entry:
    """One image of the source.

    Its name is "CLASS/FILE" whatever the layout it came in, so that the same images make the same shards from a folder
    and from an archive.
    """

    name: bytes
    container: Container
    offset: int | None
    """Of the first byte in the container; None when the container is a folder and the file stands in it."""
    size: int
    mtime: int
    label: int
    ambiguous: bool

    @property
    def key(self) -> str:
        place = b"" if self.offset is None else b"%s %d" % (os.fsencode(self.container.path.name), self.offset)
        return sample_key(self.name, self.name + place if self.ambiguous else None)

    @property
    def path(self) -> str:
        """Where to find it, for messages."""
        if self.offset is None:
            return display_name(bytes(self.container.path / _basename(self.name)))
        return f"{self.container.path}[{display_name(self.name)}]"


class Listing:
    """Entries of one split.

    Args:
        rows: `ROW` [entries].
        names: all names, one after the other, uint8 [bytes].
        containers: folders and archives that the rows refer to.
    """

    def __init__(self, rows: Rows, names: NDArray[np.uint8], containers: list[Container]) -> None:
        self.rows, self.names, self.containers = rows, names, containers
        self._text = np.asarray(names).data  # quicker to cut than an array, let alone a mapped one

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, i: int) -> bytes:
        start = int(self.rows["name_start"][i])
        return self._text[start : start + int(self.rows["name_length"][i])].tobytes()

    def entries(self, start: int, stop: int) -> Iterator[Entry]:
        for some in range(start, stop, _ROWS_AT_ONCE):
            rows = self.rows[some : min(some + _ROWS_AT_ONCE, stop)].tolist()
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
        """Write the listing; returns the files."""
        rows, names, places = (stem.with_suffix(suffix) for suffix in _SUFFIXES)
        save_array(rows, self.rows)
        save_array(names, self.names)
        # Surrogates of names that are no UTF-8 survive as \udcXX.
        containers = [(str(one.path), one.size, one.mtime) for one in self.containers]
        durable_write(places, json.dumps(containers).encode())
        return [rows, names, places]

    @classmethod
    def load(cls, stem: Path) -> Listing:
        """Map a listing whose files are those that were written."""
        rows, names, places = (stem.with_suffix(suffix) for suffix in _SUFFIXES)
        return cls(
            rows=np.load(rows, mmap_mode="r"),
            names=np.load(names, mmap_mode="r"),
            containers=[Container(Path(path), size, mtime) for path, size, mtime in json.loads(places.read_bytes())],
        )


class ListingBuilder:
    """Collects entries, one container at a time, without keeping an object for each."""

    def __init__(self) -> None:
        self._names = bytearray()
        self._rows: list[Rows] = []
        self._containers: list[Container] = []

    def add_files(self, folder: Container, found: Sequence[tuple[bytes, int, int, int]]) -> None:
        """Add (name, size, time of last change in seconds, label) of each file of a folder."""
        names, sizes, mtimes, labels = zip(*found, strict=True) if found else ((), (), (), ())
        rows = self._add(folder, names)
        rows["offset"] = LOOSE
        rows["size"] = sizes
        rows["mtime"] = mtimes
        rows["label"] = labels

    def add_ranges(self, archive: Container, found: Sequence[tuple[bytes, int, int, int]]) -> None:
        """Add (name, offset, size, label) of each range of an archive."""
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
    """The key of an image in the tar: its class and file name, in letters, digits, '-' and '_' only.

    Keys that several files would share get a hash of something that tells them apart (`unique`); keys that would be
    too long are cut, and get a hash of the name.
    """
    base = name.rfind(b"/") + 1
    dot = name.rfind(b".")
    stem = name[:dot] if dot > base else name
    key = stem.translate(_KEY_BYTES).decode("ascii")
    if unique is None and len(key) <= MAX_KEY:
        return key
    mark = "-" + xxhash.xxh3_64_hexdigest(unique or name)
    return key[: MAX_KEY - len(mark)] + mark


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

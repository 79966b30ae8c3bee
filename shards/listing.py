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

from shards.durable import durable_write, save_array

LOOSE = 2**64 - 1
"""In place of an offset: the container is a folder, and the entry a file in it, not a range of bytes in an archive."""

ROW = np.dtype(
    [
        ("name_start", "<u8"),
        ("name_length", "<u4"),
        ("container", "<u4"),
        ("offset", "<u8"),
        ("size", "<u8"),
        ("label", "<u4"),
        ("ambiguous", "u1"),  # another entry of the split would have the same key
    ]
)
Rows = NDArray[np.void]
_ROWS_AT_ONCE = 1024

# A key is what stands before '.jpg' in the tar. Readers split names at the first dot and indexes at white space, and
# plain ustar headers hold 100 characters of ASCII.
MAX_KEY = 95
_KEY_BYTES = bytes(c if chr(c).isascii() and (chr(c).isalnum() or chr(c) in "-_/") else ord("_") for c in range(256))


@dataclass(frozen=True)
class Entry:
    """One image of the source.

    Its name is "CLASS/FILE" whatever the layout it came in, so that the same images make the same shards from a folder
    and from an archive.
    """

    name: bytes
    container: Path
    offset: int | None
    """Of the first byte in the container; None when the container is a folder and the file stands in it."""
    size: int
    label: int
    ambiguous: bool

    @property
    def key(self) -> str:
        place = b"" if self.offset is None else b"%s %d" % (os.fsencode(self.container.name), self.offset)
        return sample_key(self.name, self.name + place if self.ambiguous else None)

    @property
    def path(self) -> str:
        """Where to find it, for messages."""
        if self.offset is None:
            return printable(bytes(self.container / _basename(self.name)))
        return f"{self.container}[{printable(self.name)}]"


class Listing:
    """Entries of one split.

    Args:
        rows: `ROW` [entries].
        names: all names, one after the other, uint8 [bytes].
        containers: folders and archives that the rows refer to.
    """

    def __init__(self, rows: Rows, names: NDArray[np.uint8], containers: list[Path]) -> None:
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
            for name_start, name_length, container, offset, size, label, ambiguous in rows:
                yield Entry(
                    name=self._text[name_start : name_start + name_length].tobytes(),
                    container=self.containers[container],
                    offset=None if offset == LOOSE else offset,
                    size=size,
                    label=label,
                    ambiguous=bool(ambiguous),
                )

    def save(self, stem: Path) -> None:
        save_array(stem.with_suffix(".rows.npy"), self.rows)
        save_array(stem.with_suffix(".names.npy"), self.names)
        places = [str(path) for path in self.containers]  # surrogates of names that are no UTF-8 survive as \udcXX
        durable_write(stem.with_suffix(".places.json"), json.dumps(places).encode())

    @classmethod
    def load(cls, stem: Path) -> Listing:
        places = json.loads(stem.with_suffix(".places.json").read_bytes())
        return cls(
            rows=np.load(stem.with_suffix(".rows.npy"), mmap_mode="r"),
            names=np.load(stem.with_suffix(".names.npy"), mmap_mode="r"),
            containers=[Path(place) for place in places],
        )


class ListingBuilder:
    """Collects entries, one container at a time, without keeping an object for each."""

    def __init__(self) -> None:
        self._names = bytearray()
        self._rows: list[Rows] = []
        self._containers: list[Path] = []

    def add(self, container: Path, found: Sequence[tuple[bytes, int | None, int, int]]) -> None:
        """Add (name, offset or None, size, label) of each entry of a folder or archive."""
        if not self._containers or self._containers[-1] != container:
            self._containers.append(container)
        rows = np.zeros(len(found), dtype=ROW)
        names, offsets, sizes, labels = zip(*found, strict=True) if found else ((), (), (), ())
        lengths = np.array([len(name) for name in names], dtype=np.int64)
        rows["name_length"] = lengths
        rows["name_start"] = len(self._names) + np.cumsum(lengths) - lengths
        rows["container"] = len(self._containers) - 1
        rows["offset"] = [LOOSE if offset is None else offset for offset in offsets]
        rows["size"] = sizes
        rows["label"] = labels
        self._names += b"".join(names)
        self._rows.append(rows)

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


def printable(name: bytes) -> str:
    """A file name as text, whatever its bytes."""
    return name.decode("utf-8", errors="backslashreplace")


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

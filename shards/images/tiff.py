"""Read facts from the first directory of a TIFF (TIFF 6.0, section 2) before Pillow parses all of it."""

from __future__ import annotations

import struct
from typing import NamedTuple

_ARRAYS = frozenset({273, 279, 324, 325})  # StripOffsets, StripByteCounts, TileOffsets, TileByteCounts


class _Directory(NamedTuple):
    order: str
    big: bool
    """BigTIFF: 64-bit offsets and counts."""
    first: int
    """Offset of the first entry."""
    entries: int

    @property
    def entry_size(self) -> int:
        return 20 if self.big else 12


def count_strips(data: bytes) -> int:
    """Return the largest count of strips or tiles in the first directory; 0 if the directory cannot be read."""
    largest = 0
    try:
        directory = _first_directory(data)
        for i in range(directory.entries if directory else 0):
            assert directory is not None
            form = directory.order + ("HHQ" if directory.big else "HHI")
            tag, _, count = struct.unpack_from(form, data, directory.first + directory.entry_size * i)
            if tag in _ARRAYS:
                largest = max(largest, count)
    except (struct.error, OverflowError):
        pass  # truncated directory: Pillow reports whether it can read the file
    return largest


def has_second_page(data: bytes) -> bool:
    """Return whether the file has a second directory, that is, more than one page."""
    try:
        directory = _first_directory(data)
        if directory is None:
            return False
        end = directory.first + directory.entry_size * directory.entries
        (following,) = struct.unpack_from(directory.order + ("Q" if directory.big else "I"), data, end)
    except (struct.error, OverflowError):
        return False
    return bool(0 < following < len(data))


def _first_directory(data: bytes) -> _Directory | None:
    """Find the first directory; return None if the data is not a TIFF.

    Raises:
        struct.error, OverflowError: the data ends within the header.
    """
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None:
        return None
    (version,) = struct.unpack_from(order + "H", data, 2)
    if version == 43:
        (offset,) = struct.unpack_from(order + "Q", data, 8)
        (entries,) = struct.unpack_from(order + "Q", data, offset)
        return _Directory(order, True, offset + 8, entries)
    (offset,) = struct.unpack_from(order + "I", data, 4)
    (entries,) = struct.unpack_from(order + "H", data, offset)
    return _Directory(order, False, offset + 2, entries)

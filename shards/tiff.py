"""Count the strips or tiles of a TIFF (TIFF 6.0, section 2) before Pillow reads all their offsets."""

from __future__ import annotations

import struct

_ARRAYS = frozenset({273, 279, 324, 325})  # StripOffsets, StripByteCounts, TileOffsets, TileByteCounts


def count_strips(data: bytes) -> int:
    """Return the largest count of strips or tiles in the first directory; 0 where there is none to be read."""
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None:
        return 0
    largest = 0
    try:
        (version,) = struct.unpack_from(order + "H", data, 2)
        if version == 43:  # BigTIFF: 64-bit offsets and counts
            (directory,) = struct.unpack_from(order + "Q", data, 8)
            (entries,) = struct.unpack_from(order + "Q", data, directory)
            first, size, entry = directory + 8, 20, order + "HHQ"
        else:
            (directory,) = struct.unpack_from(order + "I", data, 4)
            (entries,) = struct.unpack_from(order + "H", data, directory)
            first, size, entry = directory + 2, 12, order + "HHI"
        for i in range(entries):
            tag, _, count = struct.unpack_from(entry, data, first + size * i)
            if tag in _ARRAYS:
                largest = max(largest, count)
    except (struct.error, OverflowError):
        pass  # a truncated directory; Pillow decides whether it can read the file
    return largest

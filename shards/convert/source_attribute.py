"""The place of the source that a set was made from, as an attribute of the set's folder.

No file of a set names a place, so that the same images give the same bytes wherever they lie. Most copies of a set lose
the attribute, and some file systems have none (NFS before 4.2); then it is not known where the set came from.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

import xxhash

ATTRIBUTE = "user.fat-pipeline.source"


def record_source(out: Path, place: str) -> None:
    """Record the place of the source from which `out` is made, where the file system has attributes."""
    if sys.platform == "linux":
        with suppress(OSError):
            os.setxattr(out, ATTRIBUTE, _hash(place))


def was_converted_from(out: Path, place: str) -> bool:
    """Return whether it is known that `out` was made from the source that was at this place."""
    if sys.platform == "linux":
        with suppress(OSError):
            return os.getxattr(out, ATTRIBUTE) == _hash(place)
    return False


def _hash(place: str) -> bytes:
    return xxhash.xxh3_64_hexdigest(place.encode()).encode()

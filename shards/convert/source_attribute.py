"""Record the path of a set's source in an extended attribute of the set's folder.

The files of a set contain no path, so that the same images give the same bytes wherever the source is. Most copy tools
drop the attribute, and some file systems (NFS before 4.2) do not support it; the source of such a set is unknown.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

import xxhash

ATTRIBUTE = "user.fat-pipeline.source"


def record_source(out: Path, source: str) -> None:
    """Record the path of the source of the set `out`, if the file system supports extended attributes."""
    if sys.platform == "linux":
        with suppress(OSError):
            os.setxattr(out, ATTRIBUTE, _hash(source))


def was_converted_from(out: Path, source: str) -> bool:
    """Return whether `out` is recorded as converted from the source at this path."""
    if sys.platform == "linux":
        with suppress(OSError):
            return os.getxattr(out, ATTRIBUTE) == _hash(source)
    return False


def _hash(source: str) -> bytes:
    return xxhash.xxh3_64_hexdigest(source.encode()).encode()

"""Digests that tell one source from another, and from itself after it has changed, wherever it lies.

Times of last change and places are no part of them, so a copy of a source is the same source.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import xxhash

from shards.regular import open_with_status
from shards.sources.scan import Scan

_TAIL = 2**16  # bytes at the end of a Parquet file: its footer, or the end of it
_MODULUS = 2**64


def digest_of_listing(found: Scan) -> str:
    """Hash the classes in their order, and the names, sizes and labels of each split, whatever order they came in.

    Returns:
        xxh3-64, 16 hex digits.
    """
    splits = {}
    for split, listing in sorted(found.splits.items()):
        total = 0
        sizes, labels = listing.rows["size"].tolist(), listing.rows["label"].tolist()
        for i, (size, label) in enumerate(zip(sizes, labels, strict=True)):
            total += xxhash.xxh3_64_intdigest(b"%d %d %b" % (size, label, listing.name(i)))
        splits[split] = (len(listing), total % _MODULUS)
    classes = [(entry.folder, entry.name) for entry in found.classes]
    return xxhash.xxh3_64_hexdigest(json.dumps([classes, splits]).encode())


def digest_of_files(files: Sequence[Path], source: Path) -> str:
    """Hash names below the source, sizes and last bytes of files whose images cannot be listed without unpacking them.

    Returns:
        xxh3-64, 16 hex digits.

    Raises:
        OSError: a file cannot be read.
    """
    digest = xxhash.xxh3_64()
    for file in files:
        handle, status = open_with_status(file)
        try:
            end = os.pread(handle, _TAIL, max(0, status.st_size - _TAIL))
        finally:
            os.close(handle)
        name = file.name if file == source else os.path.relpath(file, source)
        digest.update(json.dumps([name, status.st_size, xxhash.xxh3_64_hexdigest(end)]).encode())
    return digest.hexdigest()

"""Digests that tell one source from another, and from itself after it has changed, wherever it lies.

Times of last change and places are no part of them, so a copy of a source is the same source.
"""

from __future__ import annotations

import heapq
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import xxhash

from shards.listing import Entry, Listing
from shards.regular import NotRegular, open_with_status
from shards.sources.scan import Scan

_TAIL = 2**16  # bytes at the end of a Parquet file: its footer, or the end of it
_MODULUS = 2**64
_SAMPLED = 256  # images of a split, by the hash of their names
_HEAD = 2**12


def digest_of_listing(found: Scan) -> str:
    """Hash the classes in their order, and names, sizes and labels of each split, whatever order they came in.

    Of some images the first bytes count too, because images without compression all have one size.

    Returns:
        xxh3-64, 16 hex digits.
    """
    classes = [(entry.folder, entry.name) for entry in found.classes]
    return _digest(found.splits, classes, labels=True)


def digest_of_samples(splits: Mapping[str, Listing]) -> str:
    """Hash names and sizes of samples whose names begin with their label, as `digest_of_listing`.

    The classes are left out: they depend on the options.

    Returns:
        xxh3-64, 16 hex digits.
    """
    return _digest(splits, [], labels=False)


def _digest(splits: Mapping[str, Listing], classes: Sequence[object], *, labels: bool) -> str:
    digests = {}
    for split, listing in sorted(splits.items()):
        sizes = listing.rows["size"].tolist()
        numbers = listing.rows["label"].tolist() if labels else [0] * len(sizes)
        hashes = [
            xxhash.xxh3_64_intdigest(b"%d %d %b" % (size, number, listing.name(i)))
            for i, (size, number) in enumerate(zip(sizes, numbers, strict=True))
        ]
        sampled = sorted(heapq.nsmallest(_SAMPLED, zip(hashes, range(len(hashes)), strict=True)))
        begin = xxhash.xxh3_64()
        for _, i in sampled:
            begin.update(_begin(next(listing.entries(i, i + 1))))
        digests[split] = (len(listing), sum(hashes) % _MODULUS, begin.hexdigest())
    return xxhash.xxh3_64_hexdigest(json.dumps([classes, digests]).encode())


def _begin(entry: Entry) -> bytes:
    """Return the first bytes of an image; nothing if it cannot be read, which the conversion will report."""
    name = entry.name[entry.name.rfind(b"/") + 1 :]
    path = bytes(entry.container.path) + (b"/" + name if entry.offset is None else b"")
    try:
        handle, _ = open_with_status(path)
    except (OSError, NotRegular):
        return b""
    try:
        return os.pread(handle, min(_HEAD, entry.size), entry.offset or 0)
    finally:
        os.close(handle)


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

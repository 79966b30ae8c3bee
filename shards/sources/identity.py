"""Digests that tell one source from another, and from itself after it has changed, wherever it lies.

Times of last change and places are no part of them, so a copy of a source is the same source.
"""

from __future__ import annotations

import errno
import heapq
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from shards.errors import reading, storage_error
from shards.files.regular import NotRegular, open_with_status
from shards.redact import display_name
from shards.sources.listing import Entry, Listing
from shards.sources.scan import Scan

_TAIL = 2**16  # bytes at the end of a Parquet file: its footer, or the end of it
_MODULUS = 2**64
_SAMPLED = 256  # images of a split, by the hash of their names
_HEAD = 2**12


@dataclass(frozen=True)
class Identity:
    """What tells a source from others."""

    digest: str
    splits: Mapping[str, Listing] = field(default_factory=dict)
    """Its images by split; empty where they cannot be listed without unpacking them."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Then, what `digests_of_files` gives."""


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
    """Return the first bytes of an image; nothing of a link to nothing, which the conversion will reject.

    Raises:
        StorageFailed: it cannot be read: without what it holds, the source could not be told from others later.
    """
    name = entry.name[entry.name.rfind(b"/") + 1 :]
    path = bytes(entry.container.path) + (b"/" + name if entry.offset is None else b"")
    try:
        handle, _ = open_with_status(path)
    except (FileNotFoundError, NotRegular):
        return b""
    except OSError as error:
        if error.errno == errno.ELOOP:
            return b""
        raise storage_error(entry.path, error) from error
    with reading(Path(entry.path)), os.fdopen(handle, "rb", buffering=0) as file:
        return os.pread(file.fileno(), min(_HEAD, entry.size), entry.offset or 0)


def digests_of_files(files: Sequence[Path], source: Path) -> dict[str, str]:
    """Hash sizes and last bytes of files whose images cannot be listed without unpacking them.

    Returns:
        Name below the source -> xxh3-64, 16 hex digits.

    Raises:
        OSError: a file cannot be read.
    """
    digests = {}
    for file in files:
        handle, status = open_with_status(file)
        try:
            end = os.pread(handle, _TAIL, max(0, status.st_size - _TAIL))
        finally:
            os.close(handle)
        name = file.name if file == source else os.path.relpath(file, source)
        digests[display_name(os.fsencode(name))] = xxhash.xxh3_64_hexdigest(b"%d %b" % (status.st_size, end))
    return digests


def digest_of_files(digests: Mapping[str, str]) -> str:
    """Hash what `digests_of_files` gives.

    Returns:
        xxh3-64, 16 hex digits.
    """
    return xxhash.xxh3_64_hexdigest(json.dumps(sorted(digests.items())).encode())

"""Digests that identify a source and detect changes to it.

Modification times and paths are not hashed, so a copy of a source has the same digest.
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

_TAIL = 2**16  # hashed bytes at the end of a Parquet file, which contain its footer or the end of the footer
_MODULUS = 2**64
_SAMPLED = 256  # number of images per split whose content is hashed; selected by the hash of their names
_HEAD = 2**12  # bytes hashed at the start of each selected image


@dataclass(frozen=True)
class Identity:
    """The digest of a source, and the listings from which changes can be described."""

    digest: str
    splits: Mapping[str, Listing] = field(default_factory=dict)
    """Split -> its images; empty if they cannot be listed without unpacking them (Parquet)."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Result of `digests_of_files` if `splits` is empty."""


def digest_of_listing(found: Scan) -> str:
    """Hash the classes in order, and the names, sizes, and labels of the images of each split in any order.

    The first bytes of some images are hashed too, because uncompressed images often have equal sizes.

    Returns:
        xxh3-64, 16 hex digits.
    """
    classes = [(entry.folder, entry.name) for entry in found.classes]
    return _digest(found.splits, classes, labels=True)


def digest_of_samples(splits: Mapping[str, Listing]) -> str:
    """Hash samples whose names begin with their label; otherwise like `digest_of_listing`.

    The classes are not hashed, because they depend on the options.

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
        content = xxhash.xxh3_64()
        for _, i in sampled:
            content.update(_first_bytes(next(listing.entries(i, i + 1))))
        digests[split] = (len(listing), sum(hashes) % _MODULUS, content.hexdigest())
    return xxhash.xxh3_64_hexdigest(json.dumps([classes, digests]).encode())


def _first_bytes(entry: Entry) -> bytes:
    """Return the first bytes of an image; b"" for a broken link, which the conversion will reject.

    Raises:
        StorageFailed: the image cannot be read. Its content is needed to identify the source.
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
    """Hash the size and last bytes of each file, for files whose images cannot be listed without unpacking them.

    Returns:
        Path relative to the source -> xxh3-64, 16 hex digits.

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
    """Combine the result of `digests_of_files` into one digest.

    Returns:
        xxh3-64, 16 hex digits.
    """
    return xxhash.xxh3_64_hexdigest(json.dumps(sorted(digests.items())).encode())

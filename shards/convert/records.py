"""Records of a conversion: JSON files that contain their own hash, and arrays whose hash is in such a file."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import xxhash
from pydantic import TypeAdapter

from shards.files.durable import durable_write
from shards.files.regular import read_bounded
from shards.format.index import INDEX_DTYPE, Index
from shards.schema import Count, Digest, parse_json

MAX_RECORD = 2**28
"""Maximum size of a JSON file in the work folder, in bytes."""
_CHUNK = 2**22

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ShardDone:
    """Record of a finished shard."""

    samples: Count
    bytes: Count
    hash: Digest
    repaired: dict[str, Count]
    """Reason for re-encoding -> number of images."""
    rejected: list[tuple[str, str]]
    """(name, reason) of each rejected image."""
    blank: Count = 0
    """Number of images that are nearly black or of a single color."""
    rewritten: Count = 0
    """Number of files that were modified between listing and reading, without a change of size."""
    rows_hash: str = ""
    """xxh3-64 of the file with the index rows; set when it is saved."""


@dataclass(frozen=True, kw_only=True)
class SegmentDone:
    """Record of a finished segment (one shard's part) of a .beton file."""

    hash: Digest
    rows_hash: Digest
    """xxh3-64 of the file with the index rows."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """Record of a file of the set, written before the file is renamed to its final name."""

    bytes: Count
    hash: Digest | None
    """xxh3-64 of the file; None for a .beton file, because hashing it would take too long."""


def save_record(path: Path, schema: TypeAdapter[T], record: T) -> None:
    """Write a record and the hash of its content atomically."""
    content = schema.dump_python(record, mode="json")
    digest = xxhash.xxh3_64_hexdigest(_dumps(content))
    durable_write(path, _dumps({"content": content, "digest": digest}))


def load_record(path: Path, schema: TypeAdapter[T]) -> T | None:
    """Read a record; return None if it is missing or damaged."""
    try:
        document = json.loads(read_bounded(path, MAX_RECORD))
        content = _dumps(document["content"])
        if document["digest"] != xxhash.xxh3_64_hexdigest(content):
            return None
        return parse_json(content, schema, limit=MAX_RECORD)
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, LookupError, RecursionError):
        return None


def save_rows(path: Path, rows: Index) -> str:
    """Write `INDEX_DTYPE` [samples]; return the xxh3-64 of the file, 16 hex digits."""
    out = io.BytesIO()
    np.save(out, rows, allow_pickle=False)
    durable_write(path, out.getvalue())
    return xxhash.xxh3_64_hexdigest(out.getvalue())


def load_rows(path: Path, digest: str) -> Index | None:
    """Read `INDEX_DTYPE` [samples]; return None if the file is missing or damaged."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    if xxhash.xxh3_64_hexdigest(content) != digest:
        return None
    rows: Index = np.load(io.BytesIO(content), allow_pickle=False)
    assert rows.dtype == INDEX_DTYPE
    return rows


def hash_file(path: Path) -> str:
    """Return the xxh3-64 of a file as 16 hex digits."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _dumps(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True).encode()

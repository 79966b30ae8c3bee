"""The split index: one packed row per sample, memory-mapped, so that a billion-sample set opens at once.

A sample's *id* is its row number: the order of the shards and of the samples inside them.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from shards.durable import durable_file, write_all
from shards.errors import ShardSetError

INDEX_DTYPE = np.dtype(
    [
        ("offset", "<u8"),  # of the JPEG's first byte in the tar
        ("hash", "<u8"),  # xxh3-64 of the encoded bytes
        ("shard", "<u4"),  # place in the manifest's list of the split
        ("size", "<u4"),  # encoded bytes
        ("label", "<u4"),
        ("height", "<u2"),  # of the decoded image, before any EXIF rotation
        ("width", "<u2"),
        ("orientation", "u1"),  # EXIF orientation 1..8 (1 when absent); recorded, never applied
        ("repaired", "u1"),  # 1 when the bytes were re-encoded because the source's were not plain RGB/grey JPEG
    ]
)

Index = NDArray[np.void]


def open_index(path: Path, samples: int) -> Index:
    """Memory-map an index read-only and check its dtype and length.

    Raises:
        ShardSetError: missing, damaged, of another layout, or not `samples` rows long.
    """
    remedy = "copy it again, or shard the source again"
    try:
        index = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise ShardSetError(f"{path}: the index is missing; {remedy}") from None
    except (OSError, ValueError) as error:
        raise ShardSetError(f"{path}: damaged index ({error}); {remedy}") from error
    if index.dtype != INDEX_DTYPE or index.ndim != 1:
        raise ShardSetError(f"{path}: an index of another layout ({index.dtype}); {remedy}")
    if len(index) != samples:
        raise ShardSetError(f"{path}: {samples} rows expected by the manifest, {len(index)} found; {remedy}")
    return index


def write_index(path: Path, samples: int, shards: Iterable[Index]) -> str:
    """Write a split's index, shard by shard, without holding more than one in memory.

    Args:
        samples: rows in all.
        shards: rows of each shard, in order; their `shard` is set here.

    Returns:
        xxh3-64 of the file, 16 hex digits.
    """
    digest = xxhash.xxh3_64()
    with durable_file(path) as file:

        def write(content: bytes) -> None:
            digest.update(content)
            write_all(file, content)

        write(_npy_header(samples))
        for place, rows in enumerate(shards):
            rows["shard"] = place
            write(rows.tobytes())
    return digest.hexdigest()


def _npy_header(samples: int) -> bytes:
    """Header (format 1.0) of an .npy file of that many rows."""
    out = io.BytesIO()
    fields = np.lib.format.header_data_from_array_1_0(np.zeros(0, dtype=INDEX_DTYPE))
    np.lib.format.write_array_header_1_0(out, fields | {"shape": (samples,)})
    return out.getvalue()

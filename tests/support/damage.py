"""Damage to the samples of a shard set."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from shards.format.dataset import ShardSet
from shards.format.index import INDEX_DTYPE, Index, index_bytes
from shards.format.manifest import MANIFEST_NAME, content_hash


def shard_of(path: Path, sample: int, split: str = "train") -> tuple[Path, int, int]:
    """Return the shard file of a sample, and its offset and size there."""
    row = ShardSet(path).index(split)[sample]
    return ShardSet(path).shard_path(split, int(row["shard"])), int(row["offset"]), int(row["size"])


def flip_a_bit(path: Path, sample: int = 11, split: str = "train") -> str:
    """Flip one bit of a sample; return a regular expression for the message about it."""
    shard, offset, size = shard_of(path, sample, split)
    data = bytearray(shard.read_bytes())
    data[offset + size // 2] ^= 4
    shard.write_bytes(data)
    with tarfile.open(shard) as tar:
        name = next(member.name for member in tar if member.offset_data == offset)
    return f"{shard.name}.*offset {offset} .*sample {sample}, key {name.removesuffix('.jpg')}\\)"


def edit_manifest(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit the manifest and update its hash, as the author of a hostile set can."""
    content = json.loads((path / MANIFEST_NAME).read_bytes())
    edit(content)
    content["hash"] = content_hash(content)
    (path / MANIFEST_NAME).write_text(json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def edit_index(path: Path, edit: Callable[[Index], object], split: str = "train", *, rehash: bool = True) -> None:
    """Edit rows of a split's index and, with `rehash`, update its hash in the manifest."""
    entry = ShardSet(path).split(split)
    file = path / entry.index
    content = np.fromfile(file, np.uint8)
    edit(content[index_bytes(0) :].view(INDEX_DTYPE))
    file.write_bytes(content.tobytes())
    digest = xxhash.xxh3_64_hexdigest(content)

    def update_hash(manifest: dict[str, Any]) -> None:
        found = manifest["splits"][split]
        found["index_hash"] = digest
        if not entry.tars:
            found["beton"]["index_hash"] = digest

    if rehash:
        edit_manifest(path, update_hash)

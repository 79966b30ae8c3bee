"""Damage to the samples of a shard set."""

from __future__ import annotations

import tarfile
from pathlib import Path

from shards.dataset import ShardSet


def shard_of(path: Path, sample: int, split: str = "train") -> tuple[Path, int, int]:
    """Shard, offset and size of a sample."""
    row = ShardSet(path).index(split)[sample]
    return ShardSet(path).shard_path(split, int(row["shard"])), int(row["offset"]), int(row["size"])


def flip_a_bit(path: Path, sample: int = 11, split: str = "train") -> str:
    """Damage one sample; returns a pattern of the message about it."""
    shard, offset, size = shard_of(path, sample, split)
    data = bytearray(shard.read_bytes())
    data[offset + size // 2] ^= 4
    shard.write_bytes(data)
    with tarfile.open(shard) as tar:
        name = next(member.name for member in tar if member.offset_data == offset)
    return f"{shard.name}.*offset {offset} .*sample {sample}, key {name.removesuffix('.jpg')}\\)"

"""Check in about a second, before training, that the files of a set are those that its manifest and index describe."""

from __future__ import annotations

import time

import numpy as np

from pipeline.storage.reader import Encoded, SampleReader
from shards.errors import ShardSetError
from shards.format.dataset import ShardSet

SECONDS = 1.0
SHARDS_AT_ONCE = 32


def quick_check(
    dataset: ShardSet,
    split: str,
    reader: SampleReader,
    *,
    rank: int = 0,
    world: int = 1,
    seconds: float = SECONDS,
    allow_one_bad_sample: bool = False,
) -> int:
    """Compare every file's size, then the first and the last sample of as many shards as there is time for.

    A truncated shard has another size; one that is stale, or has changed places with another, has other samples.

    Args:
        reader: of the split.
        rank, world: this rank among all. Each begins at another shard, so that together they look at more of them.
        seconds: to spend on samples, at least one look at some.
        allow_one_bad_sample: a shard with one bad sample of two is left to whoever reads it.

    Returns:
        Shards whose samples were looked at; 0 of a set whose server sends whole files only, as each of those is checked
        by its hash when it is staged.

    Raises:
        ShardSetError: names the file.
        StorageFailed: storage failed, which says nothing about the set.
    """
    dataset.check_sizes(split)
    if not reader.random_access():
        return 0
    counts = dataset.shard_samples(split)
    shards = np.flatnonzero(counts)
    shards = np.roll(shards, -(rank * len(shards) // world))
    first = np.cumsum(counts) - counts
    end = time.monotonic() + seconds
    for at in range(0, len(shards), SHARDS_AT_ONCE):
        some = shards[at : at + SHARDS_AT_ONCE]
        ids = np.stack([first[some], first[some] + counts[some] - 1], axis=1).ravel()
        _judge(reader, reader.read(ids), some, allow_one_bad_sample)
        if time.monotonic() > end:
            return at + len(some)
    return len(shards)


def _judge(reader: SampleReader, looked_at: Encoded, shards: np.ndarray, allow_one_bad_sample: bool) -> None:
    bad = {fault.row for fault in looked_at.faults}
    for place, shard in enumerate(shards.tolist()):
        if {2 * place, 2 * place + 1} <= bad:
            raise ShardSetError(
                f"{reader.file_of(shard)}: neither its first nor its last sample is the one in the index: "
                "stale, or another shard under its name; copy it again, or run 'pipeline verify' on the set"
            )
    if not allow_one_bad_sample:
        looked_at.checked()

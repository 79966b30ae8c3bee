"""A check before training, of about a second, that the files of a set match its manifest and index."""

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
    """Compare the size of every file, then verify the first and last sample of as many shards as time permits.

    The size reveals a truncated shard, the samples a shard that is outdated or was swapped with another one.

    Args:
        reader: reader of the split.
        rank, world: each rank starts at a different shard, so that the ranks together check more shards.
        seconds: time limit in seconds for the samples; at least `SHARDS_AT_ONCE` shards are checked.
        allow_one_bad_sample: accept a shard if one of its two samples is good.

    Returns:
        Number of shards whose samples were checked. 0 if the server does not support range requests; each file is then
        verified by its hash when it is staged.

    Raises:
        ShardSetError: a file does not match; the message names it.
        StorageFailed: the storage failed, which does not mean that the set is damaged.
    """
    dataset.check_sizes(split)
    if not reader.random_access():
        return 0
    counts = dataset.shard_samples(split)
    shards = np.flatnonzero(counts)
    shards = np.roll(shards, -(rank * len(shards) // world))
    first = np.cumsum(counts) - counts
    end = time.monotonic() + seconds
    for start in range(0, len(shards), SHARDS_AT_ONCE):
        some = shards[start : start + SHARDS_AT_ONCE]
        ids = np.stack([first[some], first[some] + counts[some] - 1], axis=1).ravel()
        _check_shards(reader, reader.read(ids), some, allow_one_bad_sample)
        if time.monotonic() > end:
            return start + len(some)
    return len(shards)


def _check_shards(reader: SampleReader, samples: Encoded, shards: np.ndarray, allow_one_bad_sample: bool) -> None:
    bad = {fault.row for fault in samples.faults}
    for number, shard in enumerate(shards.tolist()):
        if {2 * number, 2 * number + 1} <= bad:
            raise ShardSetError(
                f"{reader.file_of(shard)}: neither the first nor the last sample matches the index: the file is "
                "outdated or belongs to another shard; copy it again, or run 'pipeline verify' on the set"
            )
    if not allow_one_bad_sample:
        samples.checked()

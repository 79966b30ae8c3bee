"""Assign samples to shards, from their names and sizes alone, before any image is read."""

from __future__ import annotations

import numpy as np
import xxhash
from numpy.typing import NDArray

from shards.format.tar import member_bytes
from shards.images.limits import MAX_ENCODED
from shards.sources.listing import Listing

LABEL_BYTES = 8  # assumed size of a .cls member: an upper bound on the decimal digits of a label


def assign_to_shards(listing: Listing, split: str, seed: int, shard_bytes: int) -> tuple[Listing, NDArray[np.int64]]:
    """Shuffle a split globally and divide it into shards of about equal size.

    Samples are sorted by a seeded hash of their names, so their order depends neither on the order of the listing nor
    on the source layout.

    Args:
        listing: samples of the split, in any order.
        split: name of the split; part of the hash input.
        seed: seed of the hash.
        shard_bytes: upper limit of the shard size.

    Returns:
        The shuffled listing, and bounds int64 [shards + 1]: shard i has the rows bounds[i] to bounds[i + 1].
    """
    prefix = split.encode() + b"/"
    draws = np.fromiter(
        (xxhash.xxh3_64_intdigest(prefix + listing.name(i), seed) for i in range(len(listing))),
        dtype=np.uint64,
        count=len(listing),
    )
    rows = listing.rows[np.argsort(draws, kind="stable")]
    # Limit the sizes, because larger images are rejected unread, and a sparse file may have any apparent size.
    sizes = np.minimum(rows["size"], MAX_ENCODED).astype(np.int64)
    ends = np.cumsum(member_bytes(sizes) + member_bytes(np.int64(LABEL_BYTES)))
    total = int(ends[-1])
    shards = max(1, -(-total // shard_bytes))
    inner = np.searchsorted(ends, np.arange(1, shards) * (total / shards))
    bounds = np.unique(np.concatenate([[0], inner, [len(rows)]])).astype(np.int64)
    return Listing(rows, listing.names, listing.containers), bounds

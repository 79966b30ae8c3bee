"""Which sample goes to which shard: fixed from names and sizes, before any image is opened."""

from __future__ import annotations

import numpy as np
import xxhash
from numpy.typing import NDArray

from shards.format.tar import member_bytes
from shards.images.limits import MAX_ENCODED
from shards.sources.listing import Listing

LABEL_BYTES = 8  # at most, of a label's decimal digits: what a .cls member is counted as


def assign_to_shards(listing: Listing, split: str, seed: int, shard_bytes: int) -> tuple[Listing, NDArray[np.int64]]:
    """Shuffle a split globally and cut it into shards of about equal size.

    The order is that of a keyed hash of each sample's name, so it depends neither on the order of listing nor on the
    layout of the source.

    Args:
        listing: the split's entries, in any order.
        split: its name; part of what is hashed.
        seed: key of the hash.
        shard_bytes: shards become as large as this or a little smaller, all alike.

    Returns:
        The listing in its new order, and bounds int64 [shards + 1]: shard i holds rows bounds[i] to bounds[i + 1].
    """
    prefix = split.encode() + b"/"
    draws = np.fromiter(
        (xxhash.xxh3_64_intdigest(prefix + listing.name(i), seed) for i in range(len(listing))),
        dtype=np.uint64,
        count=len(listing),
    )
    rows = listing.rows[np.argsort(draws, kind="stable")]
    # Larger ones are rejected unread; of a sparse file, the size may be anything.
    sizes = np.minimum(rows["size"], MAX_ENCODED).astype(np.int64)
    ends = np.cumsum(member_bytes(sizes) + member_bytes(np.int64(LABEL_BYTES)))
    total = int(ends[-1])
    shards = max(1, -(-total // shard_bytes))
    inner = np.searchsorted(ends, np.arange(1, shards) * (total / shards))
    bounds = np.unique(np.concatenate([[0], inner, [len(rows)]])).astype(np.int64)
    return Listing(rows, listing.names, listing.containers), bounds

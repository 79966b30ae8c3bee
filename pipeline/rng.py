"""Counter-based random numbers: every draw is a pure function of its key, in any order, on any machine.

No library generator is used, since their streams may change between versions; nor `numpy.exp` and its kin, whose last
bits depend on the CPU's vector width. What remains (integer arithmetic, IEEE add, multiply, divide and square root) is
exact everywhere. Golden values are held by tests/unit/test_rng.py: changing them changes every run.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

U64 = NDArray[np.uint64]

# Constants of SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators").
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)


class Stream(IntEnum):
    """What a draw is for; part of every key, so that no two uses share numbers. Never renumber."""

    SHARD_ORDER = 1
    ROTATION = 2
    WINDOW_ORDER = 3
    CROP = 4
    FLIP = 5
    RAND_AUGMENT = 6
    ERASE = 7
    ERASE_NOISE = 8
    MIX = 9
    DROP_PATH = 10
    SUBSTITUTE = 11
    SHUFFLE = 12
    INIT = 13


def mix64(x: U64) -> U64:
    """SplitMix64's finaliser: a bijection of 64-bit integers in which every input bit reaches every output bit."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * _MIX1
        x = (x ^ (x >> np.uint64(27))) * _MIX2
    return x ^ (x >> np.uint64(31))


def bits(stream: Stream, *key: ArrayLike) -> U64:
    """64 random bits for each element of the broadcast key.

    Args:
        stream: what the draw is for.
        key: integers (negative ones wrap) or integer arrays, broadcast together: typically seed, epoch, id, counter.

    Returns:
        uint64, of the key's broadcast shape.
    """
    with np.errstate(over="ignore"):
        state = mix64(np.asarray(int(stream), dtype=np.uint64) + _GOLDEN)
        for word in key:
            state = mix64((state ^ _as_u64(word)) + _GOLDEN)
    return state


def uniform(stream: Stream, *key: ArrayLike) -> NDArray[np.float64]:
    """Uniform float64 in [0, 1) with 53 random bits, of the key's broadcast shape."""
    return (bits(stream, *key) >> np.uint64(11)).astype(np.float64) * (1.0 / (1 << 53))


def integers(high: ArrayLike, stream: Stream, *key: ArrayLike) -> NDArray[np.int64]:
    """Integers in [0, high), int64; `high` up to 2^31 (the multiply-shift bias stays below 2^-32)."""
    with np.errstate(over="ignore"):
        top = bits(stream, *key) >> np.uint64(32)
        return ((top * _as_u64(high)) >> np.uint64(32)).astype(np.int64)


def seed64(stream: Stream, *key: int) -> int:
    """One non-negative 63-bit seed for a library generator that insists on having one (torch.manual_seed)."""
    return int(bits(stream, *key)) >> 1


def _as_u64(word: ArrayLike) -> U64:
    if isinstance(word, int):
        return np.asarray(word & 0xFFFFFFFFFFFFFFFF, dtype=np.uint64)
    array = np.asarray(word)
    if array.dtype == np.uint64:
        return array
    if array.dtype.kind not in "iub":
        raise TypeError(f"integer key expected, {array.dtype} found")
    return array.astype(np.int64).view(np.uint64)

"""Numbers of the random streams, which are part of every key (pipeline/rng.py)."""

from __future__ import annotations

from pipeline.rng import Stream


def test_streams_are_never_renumbered() -> None:
    assert {stream.name: stream.value for stream in Stream} == {
        "SHARD_ORDER": 1,
        "ROTATION": 2,
        "SHUFFLE_BLOCK_ORDER": 3,
        "CROP": 4,
        "FLIP": 5,
        "RAND_AUGMENT": 6,
        "ERASE": 7,
        "ERASE_NOISE": 8,
        "MIX": 9,
        "DROP_PATH": 10,
        "REPLACEMENT": 11,
        "SHUFFLE": 12,
        "INIT": 13,
        "CLASS_QUOTA": 14,
        "CLASS_ORDER": 15,
        "FRACTION": 16,
        "MEMORY_CACHE": 17,
        "CPU_DECODE": 18,
    }

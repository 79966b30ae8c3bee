"""Options and environment of the ranks, and their start on nodes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.soak.nodes import Node

GLOBAL_BATCH = 48
"""Divisible by 2, 3 and 4 ranks."""
HANG_TIMEOUT = 10.0
SAVE_EVERY, LOCAL_EVERY = 8, 3
FIRST_PORT, PORTS = 21000, 8000


def options(*, run: Path, data: Path, seed: int, epochs: int, zero: int, feed_process: bool) -> list[str]:
    """Return the options of launch/train.py."""
    values = {
        "model": "tests.support.models:small_fat", "data": data, "out": run, "size": 32, "augment": "light",
        "global-batch": GLOBAL_BATCH, "epochs": epochs, "warmup-epochs": 0.5, "ema": 0.9, "seed": seed, "zero": zero,
        "log-every": 1, "eval-every": 2, "save-every": SAVE_EVERY, "local-checkpoint-every": LOCAL_EVERY,
        "hang-timeout": HANG_TIMEOUT, "bad-samples": "skip:100", "feed-process": "on" if feed_process else "off",
    }  # fmt: skip
    return ["--no-check-nodes", *(text for name, value in values.items() for text in (f"--{name}", str(value)))]


def start_ranks(
    nodes: Sequence[Node], *, number: int, records: Path, logs: Path, pace: float, options: Sequence[str]
) -> dict[int, int]:
    """Start a rank on each of the nodes, and return their process ids.

    Args:
        number: number of the start.
        pace: minimum duration of a step in seconds.
    """
    shared = {
        "WORLD_SIZE": str(len(nodes)), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": nodes[0].host.address,
        "MASTER_PORT": str(FIRST_PORT + number % PORTS), "SOAK_START": str(number),
    }  # fmt: skip
    arguments = [str(records), str(pace), *options]
    return {
        rank: node.start(arguments, shared | {"RANK": str(rank)}, logs / f"start-{number}-rank-{rank}.log")
        for rank, node in enumerate(nodes)
    }

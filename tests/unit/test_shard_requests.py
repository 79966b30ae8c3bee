"""Which shards are read at which steps, for reading ahead (pipeline/plan.py)."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.plan import EvalPlan, Position, TrainPlan

SHARDS = [17, 0, 40, 31, 12]


@pytest.mark.parametrize(
    ("position", "rows", "epochs", "expected"),
    [
        (
            Position(0, 0),
            range(12),
            1,
            [
                *[(0, 3, [2]), (0, 3, [2]), (0, 3, [4]), (0, 3, [3]), (0, 3, [3]), (0, 3, [0])],
                *[(4, 7, [2]), (4, 7, [1, 4, 2]), (4, 7, [4, 3]), (4, 7, [3]), (4, 7, [0]), (4, 7, [0, 2])],
            ],
        ),
        (
            Position(0, 5),
            range(4, 8),
            2,
            [
                *[(4, 7, [4, 3]), (4, 7, [3])],
                *[(8, 11, [1, 2, 4]), (8, 11, [2]), (12, 15, [2]), (12, 15, [2])],
            ],
        ),
        (Position(1, 7), range(11, 12), 2, [(12, 15, [3])]),
        (Position(2, 0), range(12), 2, []),
    ],
)
def test_golden_requests_of_training(
    position: Position, rows: range, epochs: int, expected: list[tuple[int, int, list[int]]]
) -> None:
    plan = TrainPlan(SHARDS, global_batch=12, seed=2026, shuffle_block_size=8)
    assert [tuple(request) for request in plan.shard_requests(position, rows, epochs=epochs)] == expected


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        (0, [(0, 1, [0]), (1, 3, [2]), (3, 5, [3]), (5, 6, [4])]),
        (17, [(0, 2, [2]), (2, 4, [3]), (4, 5, [4])]),
        (57, [(0, 2, [3]), (2, 2, [4])]),
        (58, [(0, 1, [3]), (2, 2, [4])]),
        (100, []),
    ],
)
def test_golden_requests_of_an_evaluation(start: int, expected: list[tuple[int, int, list[int]]]) -> None:
    plan = EvalPlan(100, batch=5, world=3, rank=1, start=start)
    for counts in (SHARDS, np.array(SHARDS, np.uint8)):
        assert [tuple(request) for request in plan.shard_requests(counts)] == expected

"""Shard requests: which shards are read at which steps (pipeline/plan.py)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray

from pipeline.plan import NO_SAMPLE, EvalPlan, Position, TrainPlan
from tests.support.plans import balanced_plans, plans, shard_sizes

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
                *[(4, 7, [2]), (4, 7, [4, 2]), (4, 7, [4, 3]), (4, 7, [3]), (4, 7, [0]), (4, 7, [0, 2])],
            ],
        ),
        (
            Position(0, 5),
            range(4, 8),
            2,
            [
                *[(4, 7, [4, 3]), (4, 7, [3])],
                *[(8, 11, [2, 4]), (8, 11, [2]), (12, 15, [2]), (12, 15, [2])],
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


@given(plans() | balanced_plans(), st.data())
def test_each_block_of_a_lane_requests_the_shards_of_its_samples_for_the_steps_that_read_it(
    plan: TrainPlan, data: st.DataObject
) -> None:
    epochs, steps, share, block = 2, plan.steps_per_epoch, plan.lane_rows, plan.shuffle_block_size
    first = data.draw(st.integers(0, epochs * steps - 1))
    rows = range(*sorted(data.draw(st.lists(st.integers(0, plan.global_batch), min_size=2, max_size=2, unique=True))))
    expected = []
    for epoch in range(first // steps, epochs):
        batches = np.stack([plan.ids(Position(epoch, step)) for step in range(steps)])
        for start in range(0, steps * share, block):
            stop = min(start + block, steps * share)
            last = epoch * steps + (stop - 1) // share
            for lane in np.unique(plan.lane_of(rows)) if last >= first else ():
                ids = batches[:, lane * share : (lane + 1) * share].ravel()[start:stop]
                expected.append((epoch * steps + start // share, last, shards_of(ids, plan._counts)))
    requests = [
        (request.first, request.last, set(request.shards))
        for request in plan.shard_requests(plan.at(first), rows, epochs=epochs)
    ]
    assert requests == expected


@given(shard_sizes, st.integers(1, 7), st.integers(1, 4), st.data())
def test_each_shard_of_an_evaluation_is_requested_for_the_steps_that_read_it(
    counts: list[int], batch: int, world: int, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, sum(counts)))
    ranks = [EvalPlan(sum(counts), batch=batch, world=world, rank=rank, start=start) for rank in range(world)]
    read = [shards_of(np.concatenate([rank.ids(step) for rank in ranks]), counts) for step in range(ranks[0].steps)]
    steps_of = {
        shard: [step for step, shards in enumerate(read) if shard in shards] for shard in sorted(set().union(*read))
    }
    expected = [(steps[0], steps[-1], [shard]) for shard, steps in steps_of.items()]
    for rank in ranks:
        assert [tuple(request) for request in rank.shard_requests(counts)] == expected


def shards_of(ids: NDArray[np.int64], counts: ArrayLike) -> set[int]:
    return set(np.searchsorted(np.cumsum(counts), ids[ids != NO_SAMPLE], side="right").tolist())

"""Properties of the training and evaluation plans (pipeline/plan.py)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray

import pipeline.plan
from pipeline.batch_shape import BatchShape
from pipeline.plan import NO_SAMPLE, EvalPlan, Position, TrainPlan, default_lanes
from pipeline.rng import Stream, bits
from tests.support.plans import plans


def epoch_ids(plan: TrainPlan, epoch: int) -> np.ndarray:
    return np.concatenate([plan.ids(Position(epoch, step)) for step in range(plan.steps_per_epoch)])


@given(plans(), st.integers(0, 5))
def test_each_sample_at_most_once_an_epoch_and_less_than_a_batch_is_left_out(plan: TrainPlan, epoch: int) -> None:
    seen = epoch_ids(plan, epoch)
    assert len(seen) == plan.samples // plan.global_batch * plan.global_batch
    assert len(set(seen)) == len(seen)
    assert set(seen) <= set(range(plan.samples))


@given(plans())
@settings(max_examples=25)
def test_no_sample_is_left_out_of_every_epoch(plan: TrainPlan) -> None:
    # A sample is omitted from an epoch with probability below 1/2, and of 200 epochs in a row with less than 2^-200.
    seen: set[int] = set()
    for epoch in range(200):
        seen |= set(epoch_ids(plan, epoch).tolist())
        if len(seen) == plan.samples:
            return
    pytest.fail(f"samples {set(range(plan.samples)) - seen} were never used")


@given(plans(), st.integers(0, 3), st.data())
def test_same_global_batches_at_every_world_size_and_accumulation(
    plan: TrainPlan, epoch: int, data: st.DataObject
) -> None:
    size = plan.global_batch
    world = data.draw(st.sampled_from([r for r in range(1, size + 1) if size % r == 0]))
    micro = data.draw(st.sampled_from([m for m in range(1, size // world + 1) if size // world % m == 0]))
    position = Position(epoch, data.draw(st.integers(0, plan.steps_per_epoch - 1)))
    rows = [
        plan.ids(position, shape.rows(m))
        for shape in (BatchShape(global_batch=size, world=world, rank=r, micro_batch=micro) for r in range(world))
        for m in range(shape.accumulation)
    ]
    assert np.concatenate(rows).tolist() == plan.ids(position).tolist()


@given(plans(), st.integers(0, 3), st.data())
def test_a_new_plan_gives_the_same_ids_at_any_position(plan: TrainPlan, epoch: int, data: st.DataObject) -> None:
    iterated = [plan.ids(Position(epoch, step)).tolist() for step in range(plan.steps_per_epoch)]
    step = data.draw(st.integers(0, plan.steps_per_epoch - 1))
    fresh = TrainPlan(
        plan._counts,
        global_batch=plan.global_batch,
        seed=plan.seed,
        lanes=plan.lanes,
        shuffle_block_size=plan.shuffle_block_size,
    )
    assert fresh.ids(Position(epoch, step)).tolist() == iterated[step]


@given(plans(), st.integers(0, 10_000))
def test_positions_count_steps_from_the_start_of_training(plan: TrainPlan, step: int) -> None:
    position = plan.at(step)
    assert plan.steps_before(position) == step
    assert plan.after(position) == plan.at(step + 1) > position


def test_a_lane_is_a_contiguous_part_of_the_stream_that_is_shuffled_within_blocks_only() -> None:
    plan = TrainPlan([1000], global_batch=10, seed=3, lanes=2, shuffle_block_size=50)
    lane = np.concatenate([plan.ids(Position(0, step), range(5)) for step in range(plan.steps_per_epoch)])
    start = min(lane[:50], key=lambda i: (i - plan._order(0).offset) % 1000)
    for number in range(10):
        block = (np.sort((lane[number * 50 : number * 50 + 50] - start) % 1000)).tolist()
        assert block == list(range(number * 50, number * 50 + 50))
    assert (np.diff(lane[:50]) != 1).sum() > 40  # shuffled, not in storage order


def test_epochs_and_seeds_differ() -> None:
    plan = TrainPlan([100] * 10, global_batch=20, seed=1)
    other = TrainPlan([100] * 10, global_batch=20, seed=2)
    assert plan.ids(Position(0, 0)).tolist() != plan.ids(Position(1, 0)).tolist()
    assert plan.ids(Position(0, 0)).tolist() != other.ids(Position(0, 0)).tolist()


# Values of the first release. Different values would change the data of every run that resumes.
GOLDEN = [
    ((0, 0), [33, 32, 45, 46, 96, 98, 71, 70, 84, 85, 10, 15]),
    ((0, 5), [37, 39, 88, 54, 63, 58, 77, 72, 0, 1, 16, 21]),
    ((7, 3), [37, 43, 54, 1, 58, 14, 69, 70, 88, 84, 20, 23]),
]


@pytest.mark.parametrize(("position", "ids"), GOLDEN)
@pytest.mark.parametrize("counts", [np.array([17, 0, 40, 31, 12], np.uint8), [17, 0, 40, 31, 12]])
def test_golden_values(counts: NDArray[np.uint8] | list[int], position: tuple[int, int], ids: list[int]) -> None:
    plan = TrainPlan(counts, global_batch=12, seed=2026, shuffle_block_size=8)
    assert plan.lanes == 6
    found = plan.ids(Position(*position))
    assert found.dtype == np.int64
    assert found.tolist() == ids


def test_rows_of_a_batch_and_their_lanes() -> None:
    plan = TrainPlan([17, 0, 40, 31, 12], global_batch=12, seed=2026, shuffle_block_size=8)
    assert plan.ids(Position(0, 0), range(3, 9)).tolist() == GOLDEN[0][1][3:9]
    assert plan.lane_of(range(3, 9)).tolist() == [1, 2, 2, 3, 3, 4]


def test_default_lanes_of_several_global_batches() -> None:
    assert {g: default_lanes(g) for g in (1024, 96, 64, 4096, 2, 1, 7, 65, 130, 134)} == {
        1024: 64, 96: 48, 64: 32, 4096: 64, 2: 1, 1: 1, 7: 7, 65: 13, 130: 13, 134: 1,
    }  # fmt: skip


def test_a_set_of_two_samples_works() -> None:
    plan = TrainPlan([1, 1], global_batch=2, seed=0)
    assert plan.steps_per_epoch == 1
    assert sorted(plan.ids(Position(0, 0)).tolist()) == [0, 1]


def test_an_evaluation_contains_each_sample_exactly_once_at_every_world_size() -> None:
    for samples in range(1, 201):
        for world in range(1, 10):
            for batch in (1, 7, 64):
                plans = [EvalPlan(samples, batch=batch, world=world, rank=rank) for rank in range(world)]
                assert len({plan.steps for plan in plans}) == 1
                ids = np.concatenate([plan.ids(step) for step in range(plans[0].steps) for plan in plans])
                assert ids[ids != NO_SAMPLE].tolist() == list(range(samples))


def test_an_evaluation_has_the_smallest_possible_number_of_steps() -> None:
    starts = (0, 10, 11, 57, 99, 100)
    assert [EvalPlan(100, batch=5, world=3, start=start).steps for start in starts] == [7, 6, 6, 3, 1, 0]
    assert EvalPlan(100, batch=5).steps == 20


def test_an_interrupted_evaluation_is_resumed_with_another_world_size() -> None:
    for samples in (1, 50, 199):
        for world, batch, most in ((1, 7, 2), (3, 4, 1), (8, 64, 0), (9, 30, 1)):
            first = [EvalPlan(samples, batch=batch, world=world, rank=rank) for rank in range(world)]
            steps = min(most, first[0].steps)
            done = first[0].samples_done(steps)
            rest = [EvalPlan(samples, batch=5, world=4, rank=rank, start=done) for rank in range(4)]
            assert len({plan.steps for plan in rest}) == 1
            ids = [plan.ids(step) for plan in first for step in range(steps)]
            ids += [plan.ids(step) for plan in rest for step in range(plan.steps)]
            real = np.concatenate(ids) if ids else np.empty(0)
            assert sorted(real[real != NO_SAMPLE].tolist()) == list(range(samples))


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Stream, int]]:
    """Record the stream and the size of each draw of a plan."""
    made = []

    def counted(stream: Stream, *key: ArrayLike) -> NDArray[np.uint64]:
        found = bits(stream, *key)
        made.append((stream, found.size))
        return found

    monkeypatch.setattr(pipeline.plan, "bits", counted)
    return made


def test_two_shuffle_blocks_per_lane_and_two_epochs_are_cached(draws: list[tuple[Stream, int]]) -> None:
    """A step may span two blocks and the reader may run ahead of the consumer, while memory stays bounded."""
    plan = TrainPlan([96], global_batch=12, seed=0, lanes=3, shuffle_block_size=8)

    def drawn(*positions: Position) -> tuple[int, int]:
        """Read these batches in turn, twice, and return how many blocks and epochs are drawn."""
        draws.clear()
        for position in (*positions, *positions):
            plan.ids(position)
        streams = [stream for stream, _ in draws]
        assert streams.count(Stream.ROTATION) == streams.count(Stream.SHARD_ORDER)
        return streams.count(Stream.SHUFFLE_BLOCK_ORDER), streams.count(Stream.ROTATION)

    assert drawn(Position(0, 0), Position(0, 2)) == (6, 1)
    assert drawn(Position(0, 0), Position(0, 1)) == (0, 0)
    assert drawn(Position(0, 0), Position(0, 4)) == (3, 0), "the last two blocks are cached"
    assert drawn(Position(0, 0), Position(0, 2), Position(0, 4)) == (15, 0), "three blocks per lane are not cached"
    assert drawn(Position(1, 0), Position(2, 0)) == (6, 2)
    assert drawn(Position(1, 0), Position(2, 0), Position(1, 2), Position(2, 2)) == (18, 0)
    assert drawn(Position(1, 1), Position(2, 1), Position(3, 0)) == (18, 4)


def test_a_plan_of_a_billion_samples_seeks_with_few_draws(draws: list[tuple[Stream, int]]) -> None:
    shards = 100_000
    plan = TrainPlan(np.full(shards, 10_000), global_batch=1024, seed=0)
    assert not draws
    rows = BatchShape(global_batch=1024, world=8, rank=5).rows(0)
    ids = plan.ids(Position(2, 700_000), rows)
    lanes = plan.lanes // 8
    assert sum(size for _, size in draws) == shards + 1 + lanes * plan.shuffle_block_size, (
        "draws: the order of the shards, the rotation, the shuffle blocks"
    )
    draws.clear()
    plan.ids(Position(2, 600_000), rows)
    assert sum(size for _, size in draws) == lanes * plan.shuffle_block_size, "the order of the shards is cached"
    assert len(np.unique(ids)) == 128

"""Invalid sizes are rejected, and the message names the nearest valid sizes (pipeline/{batch_shape,plan}.py)."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.batch_shape import BatchShape, PlanError, check_enough_samples, nearest
from pipeline.plan import EvalPlan, Position, TrainPlan


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"global_batch": 0}, "global batch 0: must be at least 1; the nearest valid size: 1"),
        (
            {"global_batch": -4, "world": 3, "micro_batch": 2},
            "global batch -4: must be at least 1; the nearest valid size: 6",
        ),
        (
            {"global_batch": 15, "world": 2, "micro_batch": 4, "pairs": True},
            "global batch 15: must be even, because mixup and CutMix mix rows in pairs; the nearest valid size: 8",
        ),
        (
            {"global_batch": 15, "world": 2, "micro_batch": 3, "pairs": True},
            "global batch 15: must be even, because mixup and CutMix mix rows in pairs; the nearest valid size: 12",
        ),
        (
            {"global_batch": 1, "pairs": True},
            "global batch 1: must be even, because mixup and CutMix mix rows in pairs; the nearest valid size: 2",
        ),
        ({"global_batch": 8, "world": 2, "rank": 2}, "rank 2 is out of range for a world size of 2"),
        ({"global_batch": 8, "world": 2, "rank": -1}, "rank -1 is out of range for a world size of 2"),
        (
            {"global_batch": 60, "world": 11},
            "world size 11 does not divide the global batch of 60; the nearest world sizes that do: 10 and 12",
        ),
        (
            {"global_batch": 60, "world": 7, "micro_batch": 0},
            "world size 7 does not divide the global batch of 60; the nearest world sizes that do: 6 and 10",
        ),
        (
            {"global_batch": 60, "world": 7, "micro_batch": 4},
            "world size 7 does not divide the global batch of 60; the nearest world sizes that do: 5 and 15",
        ),
        (
            {"global_batch": 12, "world": 5, "micro_batch": 7},
            "world size 5 does not divide the global batch of 12; the nearest world sizes that do: none",
        ),
        (
            {"global_batch": 12, "world": 12, "pairs": True},
            "world size 12 does not divide the global batch of 12 into pairs; the nearest world sizes that do: 6",
        ),
        (
            {"global_batch": 64, "world": 2, "micro_batch": 5},
            "micro-batch 5 does not divide the 32 rows of a rank; the nearest that do: 4 and 8",
        ),
        (
            {"global_batch": 64, "micro_batch": 0},
            "micro-batch 0 does not divide the 64 rows of a rank; the nearest that do: 1",
        ),
        (
            {"global_batch": 12, "world": 2, "micro_batch": 3, "pairs": True},
            "micro-batch 3 does not divide the 6 rows of a rank into pairs; the nearest that do: 2 and 6",
        ),
    ],
)
def test_batch_shapes_that_do_not_divide(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError) as error:
        BatchShape(**arguments)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        ({}, "use a global batch of at most 37"),
        ({"world": 2}, "use a global batch of at most 36 (a multiple of 2)"),
        ({"world": 37}, "use a global batch of at most 37 (a multiple of 37)"),
        ({"lanes": 5}, "use a global batch of at most 35 (a multiple of 5)"),
        ({"lanes": 5, "pairs": True}, "use a global batch of at most 30 (a multiple of 10)"),
        ({"lanes": 5, "world": 2, "pairs": True}, "use a global batch of at most 20 (a multiple of 20)"),
        ({"world": 2, "micro_batch": 3}, "use a global batch of at most 36 (a multiple of 6)"),
        ({"world": 2, "micro_batch": 3, "pairs": True}, "use a global batch of at most 36 (a multiple of 4)"),
        ({"world": 2, "micro_batch": 6, "pairs": True}, "use a global batch of at most 36 (a multiple of 12)"),
        (
            {"world": 38},
            "with these ranks, micro-batch, pairs and lanes it must be a multiple of 38, so use more images, fewer "
            "ranks, a smaller --micro-batch or fewer --lanes",
        ),
    ],
)
def test_fewer_samples_than_a_global_batch_are_rejected(arguments: dict[str, Any], advice: str) -> None:
    with pytest.raises(PlanError) as error:
        check_enough_samples(37, 60, **arguments)
    assert str(error.value) == f"37 training images are fewer than one global batch of 60; {advice}"
    check_enough_samples(60, 60, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"global_batch": 0}, "global batch 0, lanes 1, shuffle block size 4096: all must be at least 1"),
        (
            {"global_batch": 4, "lanes": 0},
            "global batch 4, lanes 0, shuffle block size 4096: all must be at least 1",
        ),
        (
            {"global_batch": 4, "shuffle_block_size": 0},
            "global batch 4, lanes 2, shuffle block size 0: all must be at least 1",
        ),
        (
            {"global_batch": 12, "lanes": 5},
            "5 lanes do not divide the global batch of 12; the nearest that do: 4 and 6",
        ),
        (
            {"global_batch": 12, "lanes": 4, "pairs": True},
            "4 lanes do not divide the global batch of 12 into pairs; the nearest that do: 3 and 6",
        ),
        (
            {"global_batch": 102, "lanes": 34, "pairs": True},
            "100 training images are fewer than one global batch of 102; use a global batch of at most 68 (a multiple "
            "of 68)",
        ),
    ],
)
def test_plans_with_sizes_that_do_not_divide_are_rejected(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError) as error:
        TrainPlan([60, 40], seed=0, **arguments)
    assert str(error.value) == message


def test_the_smallest_sizes_are_accepted() -> None:
    assert TrainPlan([1], global_batch=1, seed=0, lanes=1, shuffle_block_size=1).steps_per_epoch == 1
    assert TrainPlan([12], global_batch=12, seed=0, lanes=6, pairs=True).lane_rows == 2


def test_an_evaluation_of_an_empty_split_is_rejected() -> None:
    with pytest.raises(PlanError, match="the split to evaluate has no samples"):
        EvalPlan(0, batch=4)


@pytest.mark.parametrize(
    ("arguments", "sizes"),
    [
        ({"batch": 0}, "batch 0, rank 0, world size 1, start 0"),
        ({"batch": 1, "world": 2, "rank": 2}, "batch 1, rank 2, world size 2, start 0"),
        ({"batch": 1, "world": 2, "rank": -1}, "batch 1, rank -1, world size 2, start 0"),
        ({"batch": 1, "start": 6}, "batch 1, rank 0, world size 1, start 6"),
        ({"batch": 1, "start": -1}, "batch 1, rank 0, world size 1, start -1"),
    ],
)
def test_evaluations_with_arguments_out_of_range_are_rejected(arguments: dict[str, Any], sizes: str) -> None:
    with pytest.raises(PlanError) as error:
        EvalPlan(5, **arguments)
    assert str(error.value) == (
        f"evaluation of 5 samples with {sizes}: expected batch >= 1, 0 <= rank < world size and 0 <= start <= samples"
    )


@pytest.mark.parametrize(
    ("position", "rows", "message"),
    [
        (Position(0, 5), None, "Position(epoch=0, step=5) is out of range for a plan of 5 steps per epoch"),
        (Position(0, -1), None, "Position(epoch=0, step=-1) is out of range for a plan of 5 steps per epoch"),
        (Position(-1, 0), None, "Position(epoch=-1, step=0) is out of range for a plan of 5 steps per epoch"),
        (Position(0, 0), range(0, 10, 2), "rows range(0, 10, 2) are out of range for a global batch of 10"),
        (Position(0, 0), range(-1, 3), "rows range(-1, 3) are out of range for a global batch of 10"),
        (Position(0, 0), range(3, 11), "rows range(3, 11) are out of range for a global batch of 10"),
        (Position(0, 0), range(4, 4), "rows range(4, 4) are out of range for a global batch of 10"),
    ],
)
def test_positions_and_rows_out_of_range_are_rejected(position: Position, rows: range | None, message: str) -> None:
    with pytest.raises(IndexError) as error:
        TrainPlan([50], global_batch=10, seed=0).ids(position, rows)
    assert str(error.value) == message


@pytest.mark.parametrize("step", [3, -1])
def test_evaluation_steps_out_of_range_are_rejected(step: int) -> None:
    with pytest.raises(IndexError) as error:
        EvalPlan(5, batch=2).ids(step)
    assert str(error.value) == f"step {step} is out of range for an evaluation of 3 steps"


def test_nearest_names_one_size_below_and_one_above() -> None:
    assert nearest(3, [1, 2, 3, 4, 5]) == "2 and 4"
    assert nearest(3, [3]) == "none"

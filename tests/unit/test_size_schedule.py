"""The size schedule: a function of the step alone, whose sizes are multiples of 32."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.phases.size_schedule import SizeSchedule, parse_micro_batches
from shards.errors import UserError

SIZES = st.integers(1, 12).map(lambda number: number * 32)
LONG = 10_000


@st.composite
def schedules(draw: st.DrawFn) -> str:
    positions = sorted(draw(st.lists(st.decimals(0, 100, places=2), min_size=1, max_size=6)))
    return ",".join(f"{position}:{draw(SIZES)}" for position in positions)


def size_at(text: str, step: int, total: int) -> int:
    """The size of a step by another algorithm: floating-point interpolation."""
    points = [(float(position), int(size)) for position, size in (point.split(":") for point in text.split(","))]
    at = 100 * step / total
    if at < points[0][0]:
        return points[0][1]
    last = max(number for number, (position, _) in enumerate(points) if position <= at)
    if last == len(points) - 1:
        return points[-1][1]
    (start, first), (end, size) = points[last : last + 2]
    return int(np.floor((first + (size - first) * (at - start) / (end - start)) / 32 + 0.5)) * 32


def by_step(sizes: list[tuple[int, int]], total: int) -> list[int]:
    firsts = np.array([first for first, _ in sizes])
    return [sizes[int((firsts <= step).sum()) - 1][1] for step in range(total)]


@given(text=schedules(), total=st.integers(1, 400))
def test_every_step_has_the_interpolated_size_rounded_to_a_multiple_of_32(text: str, total: int) -> None:
    schedule = SizeSchedule.parse(text)
    sizes = schedule.sizes(total, 10)
    firsts = [first for first, _ in sizes]
    assert firsts[0] == 0
    assert firsts == sorted(set(firsts))
    assert firsts[-1] < total
    assert all(one != following for (_, one), (_, following) in itertools.pairwise(sizes))
    assert all(size % 32 == 0 and schedule.smallest <= size <= schedule.largest for _, size in sizes)
    expected = [size_at(text, step, total) for step in range(total)]
    # Exact arithmetic and floating point may round a value halfway between two sizes differently.
    found = by_step(sizes, total)
    assert sum(a != b for a, b in zip(found, expected, strict=True)) <= 2 * len(schedule.points)


@given(text=schedules(), total=st.integers(1, 400), factor=st.integers(2, 5))
def test_a_longer_training_has_the_same_sizes_at_the_same_fractions(text: str, total: int, factor: int) -> None:
    schedule = SizeSchedule.parse(text)
    short = by_step(schedule.sizes(total, 10), total)
    long = by_step(schedule.sizes(total * factor, 10 * factor), total * factor)
    assert long[::factor] == short


@given(text=schedules(), epochs=st.integers(1, 50), steps=st.integers(1, 20))
def test_positions_in_epochs_and_in_percent_are_the_same_schedule(text: str, epochs: int, steps: int) -> None:
    # Percentages of 100 epochs are epochs.
    in_epochs = text.replace(":", "e:")
    assert SizeSchedule.parse(in_epochs).sizes(100 * steps, steps) == SizeSchedule.parse(text).sizes(100 * steps, steps)


@pytest.mark.parametrize("text", ["0:32,33.333333333:64", "0e:32,123456789.987654321e:64", "0:32,100:64"])
def test_a_schedule_is_written_with_all_digits(text: str) -> None:
    """A run compares its schedule with that of the checkpoint from which it resumes."""
    assert str(SizeSchedule.parse(text)) == text


def test_the_published_schedule() -> None:
    schedule = SizeSchedule.parse("0:128,65:192,85:224")
    assert schedule.sizes(LONG, 100) == [(0, 128), (1625, 160), (4875, 192), (7500, 224)]
    assert (schedule.smallest, schedule.largest, schedule.last) == (128, 224, 224)
    assert str(schedule) == "0:128,65:192,85:224"


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("0:128", [(0, 128)]),
        ("50:128,50:224", [(0, 128), (5000, 224)]),  # a jump
        ("0:128,40:128,40:192,80:192,80:224", [(0, 128), (4000, 192), (8000, 224)]),  # sizes that are held
        ("10:64,20:96", [(0, 64), (1500, 96)]),
        ("0:96,100:32", [(0, 96), (2501, 64), (7501, 32)]),  # halfway between two sizes, the larger one
        ("0e:128,16e:128,16e:192", [(0, 128), (1600, 192)]),
        ("0:128,16e:192,100:224", [(0, 128), (400, 160), (1200, 192), (5800, 224)]),
        ("0:128,100:224", [(0, 128), (1667, 160), (5000, 192), (8334, 224)]),
        ("0:128,100:128,100:224", [(0, 128)]),  # no step is at 100 %
    ],
)
def test_sizes_of_a_training_of_100_epochs(text: str, sizes: list[tuple[int, int]]) -> None:
    assert SizeSchedule.parse(text).sizes(LONG, 100) == sizes


def test_a_training_without_end_needs_positions_in_epochs() -> None:
    assert SizeSchedule.parse("0e:64,2e:64,2e:96").sizes(None, 10) == [(0, 64), (20, 96)]
    with pytest.raises(UserError, match="50:96 is a percentage of the training, whose number of epochs is not given"):
        SizeSchedule.parse("0e:64,50:96").sizes(None, 10)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not a point; expected POSITION:SIZE"),
        ("0:128,,85:224", "'' is not a point"),
        ("0:128;85:224", "'0:128;85:224' is not a point"),
        ("-1:128", "'-1:128' is not a point"),
        ("0:100", "the size of 0:100 is not a multiple of 32 from 32 to 8192; the nearest is 96"),
        ("0:0", "the nearest is 32"),
        ("0:128,120:224", "the position of 120:224 is a percentage of the training, at most 100; for a number of"),
        ("0:128,85:224,65:192", "65:192 is before 85:224; write the points in ascending order"),
        (",".join(f"{position}:64" for position in range(101)), "101 points; expected at most 100"),
    ],
)
def test_invalid_schedules_are_rejected(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SizeSchedule.parse(text)


def test_points_must_be_within_the_training_and_in_order() -> None:
    schedule = SizeSchedule.parse("0:128,16e:192,85:224")
    schedule.check_epochs(30)
    with pytest.raises(UserError, match="85:224 is before 16e:192"):
        schedule.check_epochs(18)
    with pytest.raises(UserError, match="16e:192 is beyond the last of the 10 epochs"):
        schedule.check_epochs(10)


def test_micro_batches_by_size() -> None:
    schedule = SizeSchedule.parse("0:128,65:192,85:224")
    assert parse_micro_batches("128:256, 192:128", schedule) == {128: 256, 192: 128}
    for text, message in {
        "128": "'128' is not an entry; expected SIZE:IMAGES",
        "128:0": "'128:0' is not an entry",
        "130:64": "images never have 130 pixels; expected multiples of 32 from 128 to 224",
        "256:64": "images never have 256 pixels",
        "128:64,128:32": "the size 128 occurs twice",
    }.items():
        with pytest.raises(UserError, match=message):
            parse_micro_batches(text, schedule)


@given(text=schedules(), least=st.floats(0, 1))
def test_the_strength_rises_linearly_with_the_size_to_1(text: str, least: float) -> None:
    schedule = SizeSchedule.parse(text)
    assert schedule.strength(schedule.largest, least) == 1
    if schedule.smallest < schedule.largest:
        assert schedule.strength(schedule.smallest, least) == pytest.approx(least)
        middle = (schedule.smallest + schedule.largest) // 2
        assert schedule.strength(middle, least) == pytest.approx((1 + least) / 2, abs=1e-9)

"""benchmarks/digits_race.py: what it compares, and the ratio that it reports."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.digits_race import RECIPE, TARGET, WAYS, summary
from launch.config.command_line import parse
from launch.race.results import SeedResult

RESULT = SeedResult(0, 200.0, 200.0, TARGET, 9, 198, 1, "CPU", 1)


def test_both_ways_train_the_same_recipe_except_for_the_size_schedule() -> None:
    recipes = {way: parse(options) for way, options in WAYS.items()}
    without, scheduled = recipes["without"], recipes["with"]
    assert without == parse(RECIPE.split())
    assert replace(scheduled, data=replace(scheduled.data, size_schedule=None)) == without
    sizes = scheduled.data.sizes
    assert sizes is not None
    assert (sizes.smallest, sizes.last, scheduled.data.evaluation_size) == (32, 64, 64)


@pytest.mark.parametrize(
    ("without", "scheduled", "ratio"),
    [([200.0, 300.0, 100.0], [80.0, 100.0, 160.0], 2.0), ([200.0], [], None), ([200.0], [None], None)],
)
def test_the_ratio_is_that_of_the_medians(
    without: list[float | None], scheduled: list[float | None], ratio: float | None
) -> None:
    ways = {"without": without, "with": scheduled}
    results = {way: [replace(RESULT, seconds=time) for time in times] for way, times in ways.items()}
    found = summary(results)
    assert found["ratio"] == ratio
    assert [len(own) for own in found["results"].values()] == [len(without), len(scheduled)]

"""Time to accuracy from the metrics of a run (launch/monitor/time_to_accuracy.py)."""

from __future__ import annotations

from typing import Any

import pytest

from launch.monitor.time_to_accuracy import TimeToAccuracy, time_to_accuracy


def start(step: int, target: float | None, clock: float = 0.0) -> list[dict[str, Any]]:
    found = {"kind": "run_start", "step": step, "clock": clock}
    return [{"kind": "start", "step": step}, found if target is None else found | {"target_top1": target}]


def evaluation(step: int, top1: float, clock: float, kind: str = "eval") -> dict[str, Any]:
    return {"kind": kind, "step": step, "epoch": step // 10, "top1": top1, "clock": clock}


def steps(first: int, last: int) -> dict[str, Any]:
    return {"kind": "train", "step": last, "steps": last - first, "epoch": 1 + (last - 1) // 10}


def test_the_first_evaluation_that_reaches_the_target_counts() -> None:
    lines = [*start(0, 0.75), evaluation(10, 0.5, 4.0), evaluation(20, 0.75, 8.0), evaluation(30, 0.9, 12.0)]
    found = time_to_accuracy(lines)
    assert found == TimeToAccuracy(0.75, top1=0.75, epoch=2, step=20, seconds=8.0)
    assert found.reached
    assert found.describe() == "75.00% in 8.0 s, epoch 2"


def test_the_moving_average_counts_too() -> None:
    lines = [*start(0, 0.75), evaluation(10, 0.5, 4.0), evaluation(10, 0.8, 4.0, "eval-ema"), evaluation(20, 0.9, 8.0)]
    assert time_to_accuracy(lines) == TimeToAccuracy(0.75, top1=0.8, epoch=1, step=10, seconds=4.0)


def test_the_best_accuracy_is_shown_if_the_target_is_not_reached() -> None:
    lines = [*start(0, 0.75), evaluation(10, 0.6, 4.0), evaluation(20, 0.5, 8.0)]
    found = time_to_accuracy(lines)
    assert found == TimeToAccuracy(0.75, top1=0.6, epoch=1, step=10, seconds=None)
    assert not found.reached
    assert found.describe() == "75.00% not reached, best 60.00%"
    assert time_to_accuracy(start(0, 0.75)) == TimeToAccuracy(0.75, top1=0.0, epoch=0, step=0, seconds=None)


def test_evaluations_that_a_later_start_repeated_do_not_count() -> None:
    """A start was killed after the evaluation that reached the target, and before it was saved."""
    killed = [*start(0, 0.75), steps(0, 10), evaluation(10, 0.5, 4.0), steps(10, 20), evaluation(20, 0.8, 8.0)]
    resumed = [*start(10, 0.75, clock=4.5), steps(10, 20), evaluation(20, 0.8, 9.0)]
    found = time_to_accuracy(killed + resumed)
    assert found is not None
    assert (found.step, found.seconds) == (20, 9.0)


@pytest.mark.parametrize(("given", "expected"), [(None, 8.0), (0.5, 4.0), (0.95, None)])
def test_the_target_is_the_given_one_or_that_of_the_last_start(given: float | None, expected: float | None) -> None:
    lines = [*start(0, 0.5), evaluation(10, 0.5, 4.0), *start(10, 0.75, clock=4.0), evaluation(20, 0.9, 8.0)]
    found = time_to_accuracy(lines, given)
    assert found is not None
    assert found.seconds == expected


def test_runs_without_a_target_have_no_time_to_accuracy() -> None:
    assert time_to_accuracy([*start(0, None), evaluation(10, 0.5, 4.0)]) is None
    assert time_to_accuracy([]) is None

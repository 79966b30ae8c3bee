"""Goodput of a real run that is killed, preempted and resumed at another world size."""

from __future__ import annotations

import signal
from itertools import pairwise
from pathlib import Path

import pytest

from launch.monitor import goodput as categories
from launch.monitor.goodput_table import read_goodput
from launch.run.metrics_file import final_timeline, read_metrics, starts
from tests.dist.trainings import Trainer
from tests.support.runs import OPTIONS, start, wait_for_step

STEPS = 18


@pytest.mark.slow
def test_goodput_of_a_killed_preempted_and_resumed_run(train: Trainer, tmp_path: Path, digits: Path) -> None:
    run = tmp_path / "run"
    options = ("--data", digits, "--out", run, "--save-every", "4", "--stop-after", str(STEPS))
    for step in (6, 9, 11):
        wait_for_step(run, step, train.start(*OPTIONS, *options))
        train.kill()
    preempted = train.start(*OPTIONS, *options)
    wait_for_step(run, 13, preempted)
    preempted.send_signal(signal.SIGTERM)
    assert preempted.wait() == 75
    last = start(tmp_path, *options, ranks=2)
    assert last.wait(timeout=240) == 0, last.stderr and last.stderr.read()

    lines = read_metrics(run)
    found = read_goodput(run, warn=print)
    assert [begun.world for begun in found.starts] == [1, 1, 1, 1, 2]
    assert [begun.ended for begun in found.starts] == ["killed"] * 3 + ["preempted (SIGTERM)", "finished"]
    assert found.wall == sum(found.categories.values())
    assert found.wall == pytest.approx(lines[-1]["time"] - lines[0]["started"], rel=0.01)
    assert found.categories[categories.OTHER] < 0.01 * found.wall
    assert all(seconds >= 0 for seconds in found.categories.values())
    assert not found.notes

    trained = [line["step"] for line in lines if line["kind"] == "train"]
    unlogged = [
        max(0, (after[0].get("previous_step") or 0) - max(line["step"] for line in before))
        for before, after in pairwise(starts(lines))
    ]
    assert found.lost_steps == len(trained) - STEPS + sum(unlogged)
    assert found.starts[3].lost_steps == 0
    assert found.lost_steps > 0
    assert found.categories[categories.LOST] > 0
    assert [line["step"] for line in final_timeline(lines) if line["kind"] == "train"] == list(range(1, STEPS + 1))

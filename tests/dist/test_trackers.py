"""Trackers of a run that is killed and resumed."""

from __future__ import annotations

from pathlib import Path

from tests.dist.trainings import Trainer
from tests.support.launching import lines
from tests.support.runs import OPTIONS, wait_for_step
from tests.support.tracker_readers import tensorboard_steps


def test_tensorboard_reads_each_step_of_a_killed_and_resumed_run_once(
    train: Trainer, tmp_path: Path, digits: Path
) -> None:
    run = tmp_path / "run"
    options = (*OPTIONS, "--data", digits, "--out", run, "--save-every", "3", "--tracker", "tensorboard")
    process = train.start(*options)
    wait_for_step(run, 8, process)
    train.kill()
    done = train(*options, "--stop-after", "12")
    assert done.returncode == 0, done.stderr
    trained = [line["step"] for line in lines(run, "train")]
    assert len(trained) > len(set(trained)), "no step was repeated"

    steps = tensorboard_steps(run)
    assert steps["train/loss"] == steps["train/lr"] == list(range(1, 13))
    assert steps["eval/top1"] == steps["eval/hardest"] == [12]
    assert steps["train/images"] == [1]

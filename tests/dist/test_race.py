"""`pipeline race`: several seeds until an accuracy is reached, resumed after an interruption."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.launching import lines, run
from tests.support.runs import ranks_of, spawn, status, wait_for_step

RACE = (sys.executable, "-m", "launch.cli", "race")
TRAINING = (
    *("--", "--model", "tests.support.models:with_classifier", "--size", "32", "--augment", "light"),
    *("--warmup-epochs", "0", "--global-batch", "32", "--classes-subset", "3", "--fraction", "0.3"),
    *("--compile", "off", "--log-every", "1"),
)
STEPS = 4
"""Optimizer steps per epoch."""


def results(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "race.json").read_text())["results"]


@pytest.mark.slow
def test_a_race_trains_each_seed_until_the_accuracy_and_skips_finished_seeds(tmp_path: Path, digits: Path) -> None:
    out = tmp_path / "race"

    def race(seeds: str, *options: str, processes: int = 1) -> tuple[int, str, str]:
        command = (*RACE, digits, "--to", "0.01", "--seeds", seeds, "--out", out, "--processes", str(processes))
        done = run(tmp_path, *command, *TRAINING, "--epochs", "2", *options)
        return done.returncode, done.stdout, done.stderr

    code, shown, errors = race("3", processes=2)
    assert code == 0, errors
    assert "time to 1.00%, median of 1 seed: " in shown
    assert len(lines(out / "seed-3", "train")) == STEPS
    before = (out / "seed-3" / "metrics.jsonl").read_bytes()

    code, shown, errors = race("3,4")
    assert code == 0, errors
    assert [line.split()[:4] for line in shown.splitlines()[:3]] == [
        ["seed", "reached", "epoch", "step"],
        ["3", "yes", "1", "4"],
        ["4", "yes", "1", "4"],
    ]
    assert (out / "seed-3" / "metrics.jsonl").read_bytes() == before
    assert [(found["seed"], found["world"], found["starts"]) for found in results(out)] == [(3, 2, 1), (4, 1, 1)]
    first = lines(out / "seed-4", "eval")[0]
    assert results(out)[1]["seconds"] == first["clock"] <= results(out)[1]["wall_seconds"] + 0.01

    code, _, errors = race("3", "--lr", "0.1")
    assert code == 2
    assert "seed-3: was trained with other options ([optim] lr was None, now 0.1); use the same options" in errors


def test_an_interrupted_race_is_resumed_and_keeps_its_clock(tmp_path: Path, digits: Path) -> None:
    out = tmp_path / "race"
    command = (*RACE, digits, "--to", "1", "--out", out, "--processes", "1", *TRAINING, "--epochs", "40")
    process = spawn(tmp_path, *command)
    wait_for_step(out / "seed-0", 2 * STEPS, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(100) == 75, process.stderr and process.stderr.read()
    assert status(out / "seed-0")["status"] == "preempted"
    assert ranks_of(out / "seed-0") == []
    assert not (out / "race.json").exists()

    done = run(tmp_path, *command)
    assert done.returncode == 1, done.stderr  # three classes of 36 digits are not all recognized
    assert "time to 100.00%, median of 1 seed: not reached" in done.stdout
    (found,) = results(out)
    assert (found["starts"], found["seconds"]) == (2, None)
    first, second = lines(out / "seed-0", "run_start")
    assert first["clock"] == 0.0 < second["clock"]
    (stop,) = lines(out / "seed-0", "run_stop")
    assert (stop["status"], stop["step"]) == ("aborted", 40 * STEPS)
    assert stop["clock"] > second["clock"]

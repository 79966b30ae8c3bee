"""Runs that are killed, asked to leave, starved of disk or fed nonsense: nothing is lost, and everybody is told."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.dist.trainings import TRAIN, Trainer
from tests.support.launching import lines, python
from tests.support.runs import OPTIONS, ranks_of, start, status, wait_for_step
from tests.support.waiting import wait_until

PROVOKE = "tests.dist.provoke"


def test_sigterm_under_the_launcher_saves_once_leaves_no_orphans_and_resumes_at_the_next_step(
    train: Trainer, tmp_path: Path, digits: Path
) -> None:
    run = tmp_path / "run"
    process = start(tmp_path, "--data", digits, "--out", run, ranks=2)
    wait_for_step(run, 3, process)
    for pid in ranks_of(run):  # as SLURM does: every process, and the launcher passes it on as well
        os.kill(pid, signal.SIGTERM)
    process.wait(timeout=60)
    assert ranks_of(run) == []
    left = status(run)
    assert left["status"] == "preempted"
    assert "SIGTERM" in left["reason"]
    assert left["step"] >= 3
    saved = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert saved == [f"step-{left['step']:08d}"]

    done = train(*OPTIONS, "--data", digits, "--out", run, "--stop-after", str(left["step"] + 1))
    assert done.returncode == 0, done.stderr
    assert lines(run, "start")[-1]["step"] == left["step"]
    ended = status(run)
    assert (ended["status"], ended["step"], ended["reason"]) == ("finished", left["step"] + 1, "")


@pytest.mark.parametrize(
    ("how", "reason"), [("file", "the file PREEMPT"), ("usr2", "SIGUSR2"), ("deadline", "the deadline")]
)
def test_other_ways_of_asking_end_with_the_reserved_status(
    train: Trainer, tmp_path: Path, digits: Path, how: str, reason: str
) -> None:
    run = tmp_path / "run"
    limit = ("--time-limit", "0.05") if how == "deadline" else ()
    process = train.start(*OPTIONS, "--data", digits, "--out", run, *limit)
    if how != "deadline":
        wait_for_step(run, 1, process)
    if how == "file":
        (run / "PREEMPT").touch()
    elif how == "usr2":
        process.send_signal(signal.SIGUSR2)
    assert process.wait(timeout=60) == 75
    assert (status(run)["status"], status(run)["reason"]) == ("preempted", reason)
    assert not (run / "PREEMPT").exists()


def test_a_save_on_request_lets_the_run_go_on(train: Trainer, tmp_path: Path, digits: Path) -> None:
    run = tmp_path / "run"
    process = train.start(*OPTIONS, "--data", digits, "--out", run)
    wait_for_step(run, 1, process)
    process.send_signal(signal.SIGUSR1)
    wait_until(lambda: list((run / "checkpoints").glob("step-*")))
    assert process.poll() is None
    train.kill()
    step = int(next((run / "checkpoints").glob("step-*")).name.removeprefix("step-"))
    assert step % 22 != 0  # not one of the saves at epoch ends


@pytest.mark.slow
def test_a_second_signal_seconds_later_ends_the_run_at_once(tmp_path: Path, digits: Path) -> None:
    """Asked to leave within a step of many seconds, and then asked again."""
    run = tmp_path / "run"
    process = start(tmp_path, "--data", digits, "--out", run, script=("tests/dist/provoke.py", "slow"))
    wait_for_step(run, 1, process)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # the same request by another way
    time.sleep(6)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 128 + signal.SIGTERM
    assert not list((run / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("average", [(), ("--ema", "0.9")], ids=["weights", "average"])
def test_asked_to_leave_during_an_evaluation_the_run_saves_and_evaluates_when_it_is_back(
    train: Trainer, tmp_path: Path, digits: Path, average: tuple[str, ...]
) -> None:
    run = tmp_path / "run"
    options = ("--data", digits, "--out", run, "--stop-after", "2", "--eval-batch", "40", *average)
    assert train("ask", *OPTIONS, *options, program=PROVOKE).returncode == 75
    assert lines(run, "eval") == lines(run, "eval-ema") == []
    assert status(run)["step"] == 2
    saved = load_file(run / "checkpoints" / "step-00000002" / "state.safetensors")
    done = train(*OPTIONS, *options)
    assert done.returncode == 0, done.stderr
    kinds = {"eval": ("model", "weights")} | ({"eval-ema": ("ema", "weights-ema")} if average else {})
    for kind, (key, name) in kinds.items():
        assert [(line["step"], line["samples"]) for line in lines(run, kind)] == [(2, 360)]
        weights = load_file(run / f"{name}.safetensors")
        assert all(torch.equal(saved[f"{key}/{n}"], w) for n, w in weights.items() if w.is_floating_point())


def test_a_run_that_starts_afresh_sets_the_old_one_aside(train: Trainer, tmp_path: Path, digits: Path) -> None:
    run = tmp_path / "run"
    for steps, resume in (("4", "auto"), ("2", "never")):
        options = ("--data", digits, "--out", run, "--stop-after", steps, "--save-every", "1", "--resume", resume)
        done = train(*OPTIONS, *options)
        assert done.returncode == 0, done.stderr
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step-00000001", "step-00000002"]
    assert (run / "checkpoints-before-1" / "step-00000004").is_dir()
    assert [line["step"] for line in lines(run, "train")] == [1, 2]


def killed_and_resumed(
    train: Trainer,
    run: Path,
    digits: Path,
    *options: str,
    kills: int,
    seed: int,
    steps: int,
    worlds: tuple[int, ...],
    recorded: bool = False,
) -> Path:
    """A run of `steps` steps in the folder `run` that is killed `kills` times at random moments and resumed."""
    chance = random.Random(seed)
    goal = (*OPTIONS, "--data", digits, "--out", run, "--stop-after", str(steps), "--save-every", "2", *options)
    program, kind = (PROVOKE, ("record",)) if recorded else (TRAIN, ())
    for number in range(kills):
        process = train.start(*kind, *goal, program=program, ranks=worlds[number % len(worlds)])
        begun = max([0, *(line["step"] for line in lines(run, "train"))]) if (run / "metrics.jsonl").exists() else 0
        if begun < steps:
            wait_for_step(run, min(begun + 1, steps), process)
            time.sleep(chance.uniform(0, 2))
        train.kill()
    done = train(*kind, *goal, program=program, ranks=worlds[0])
    assert done.returncode == 0, done.stderr
    return run


def assert_bit_identical(a: Path, b: Path) -> None:
    x, y = load_file(a / "weights.safetensors"), load_file(b / "weights.safetensors")
    assert x.keys() == y.keys()
    assert all(torch.equal(x[name], y[name]) for name in x)


def test_a_run_killed_again_and_again_ends_at_the_same_weights(train: Trainer, tmp_path: Path, digits: Path) -> None:
    how: dict[str, Any] = {"seed": 1, "steps": 8, "worlds": (1,)}
    whole = killed_and_resumed(train, tmp_path / "whole", digits, kills=0, **how)
    assert_bit_identical(whole, killed_and_resumed(train, tmp_path / "killed", digits, kills=2, **how))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("worlds", [(1,), (2,)])
def test_ten_kills_at_one_world_size_change_no_bit(
    train: Trainer, tmp_path: Path, digits: Path, worlds: tuple[int, ...]
) -> None:
    how: dict[str, Any] = {"seed": 7, "steps": 30, "worlds": worlds}
    whole = killed_and_resumed(train, tmp_path / "whole", digits, kills=0, **how)
    assert_bit_identical(whole, killed_and_resumed(train, tmp_path / "killed", digits, kills=10, **how))


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_ten_kills_with_changing_world_sizes_change_neither_what_is_fed_nor_where_it_leads(
    train: Trainer, tmp_path: Path, digits: Path
) -> None:
    """Float32, constant rate, BatchNorm frozen and no drop path: what remains is the order of floating-point sums."""
    constant = ("--lr", "1e-3", "--min-lr", "1e-3", "--warmup-epochs", "0", "--freeze-bn", "--augment", "fat")
    how: dict[str, Any] = {"seed": 3, "steps": 50, "recorded": True}
    whole = killed_and_resumed(train, tmp_path / "whole", digits, *constant, kills=0, worlds=(1,), **how)
    killed = killed_and_resumed(train, tmp_path / "killed", digits, *constant, kills=10, worlds=(2, 1, 4), **how)

    reference = {entry["step"]: entry for entry in map(json.loads, (whole / "fed-0.jsonl").read_text().splitlines())}
    fed = [json.loads(line) for path in killed.glob("fed-*.jsonl") for line in path.read_text().splitlines()]
    assert {entry["world"] for entry in fed} == {1, 2, 4}
    assert {entry["step"] for entry in fed} == set(range(50))
    for entry in fed:
        rows = len(entry["ids"])
        own = slice(entry["rank"] * rows, (entry["rank"] + 1) * rows)
        assert entry["ids"] == reference[entry["step"]]["ids"][own]
        assert entry["pixels"] == reference[entry["step"]]["pixels"][own]

    losses = [line["loss"] for line in lines(whole, "train")]
    assert sum(losses[-5:]) < sum(losses[:5])
    x, y = load_file(whole / "weights.safetensors"), load_file(killed / "weights.safetensors")
    names = [name for name in x if x[name].is_floating_point()]
    a, b = (torch.cat([weights[name].double().flatten() for name in names]) for weights in (x, y))
    assert float((a - b).norm() / a.norm()) < 1e-4


def test_nan_images_are_skipped_counted_and_at_last_refused_by_name(
    train: Trainer, tmp_path: Path, digits: Path
) -> None:
    options = (*OPTIONS, "--data", digits, "--out", tmp_path / "run", "--max-bad-steps", "3", "--stop-after", "9")
    done = train("nan", *options, program=PROVOKE)
    assert done.returncode == 1
    assert "step 3: non-finite gradients; the update was skipped" in done.stderr
    assert "error: 3 steps in a row, up to step 8, had non-finite gradients (rank 0: samples" in done.stderr
    assert status(tmp_path / "run")["status"] == "failed"
    assert [line["skipped"] for line in lines(tmp_path / "run", "train")] == [0, 0, 1, 1, 1, 2, 3]


def test_ranks_that_drift_apart_are_noticed(train: Trainer, tmp_path: Path, digits: Path) -> None:
    options = (*OPTIONS, "--data", digits, "--out", tmp_path / "run", "--compare-every", "2", "--stop-after", "6")
    done = train("drift", *options, program=PROVOKE, ranks=2)
    assert done.returncode != 0
    assert "error: step 4: the weights differ between ranks" in done.stderr


def test_a_full_disk_leaves_the_run_and_its_checkpoints_alive(train: Trainer, tmp_path: Path, digits: Path) -> None:
    """A file-size limit stands for a full disk: the write fails in the same place with another errno."""
    run = tmp_path / "run"
    options = (*OPTIONS, "--data", digits, "--out", run, "--save-every", "2", "--stop-after", "6")
    done = train("disk", *options, program=PROVOKE)
    assert done.returncode == 0, done.stderr
    assert "warning: " in done.stderr
    assert "step-00000004: checkpoint not written" in done.stderr
    assert [line["step"] for line in lines(run, "train")] == [1, 2, 3, 4, 5, 6]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000002", "step-00000006"]


def test_an_unwritable_run_folder_is_refused_at_once(train: Trainer, tmp_path: Path, digits: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = train(*OPTIONS, "--data", digits, "--out", tmp_path / "file" / "run")
    assert done.returncode == 2
    assert "the run folder cannot be written" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_save_holds_the_training_thread_only_briefly(tmp_path: Path) -> None:
    done = python(tmp_path, "tests/dist/provoke.py", "stall", "--variant", "b3")
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    assert measured["megabytes"] > 300
    # The bound is 50 ms per 100 MB; twice that leaves room for a busy machine.
    assert measured["milliseconds_per_100_megabytes"] < 100

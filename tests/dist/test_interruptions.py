"""Runs that are killed, preempted, or fail for lack of disk space or because of NaN: no work is lost."""

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

from launch.resilience.stop_signals import SAME_KEY_PRESS_SECONDS
from launch.run.metrics_file import final_timeline, read_metrics
from tests.dist.trainings import TRAIN, Trainer
from tests.support.disks import fill, small_disk
from tests.support.launching import lines, python
from tests.support.runs import OPTIONS, ranks_of, start, status, wait_for_step
from tests.support.waiting import wait_until

INJECT_FAULT = "tests.dist.inject_fault"


def test_sigterm_under_the_launcher_saves_once_ends_all_ranks_and_resumes_at_the_next_step(
    train: Trainer, tmp_path: Path, digits: Path
) -> None:
    run = tmp_path / "run"
    process = start(tmp_path, "--data", digits, "--out", run, ranks=2)
    wait_for_step(run, 3, process)
    for pid in ranks_of(run):  # like SLURM: signal every process, in addition to which the launcher forwards the signal
        os.kill(pid, signal.SIGTERM)
    process.wait(timeout=60)
    assert ranks_of(run) == []
    stopped = status(run)
    assert stopped["status"] == "preempted"
    assert "SIGTERM" in stopped["reason"]
    assert stopped["step"] >= 3
    saved = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert saved == [f"step-{stopped['step']:08d}"]

    done = train(*OPTIONS, "--data", digits, "--out", run, "--stop-after", str(stopped["step"] + 1))
    assert done.returncode == 0, done.stderr
    assert lines(run, "start")[-1]["step"] == stopped["step"]
    ended = status(run)
    assert (ended["status"], ended["step"], ended["reason"]) == ("finished", stopped["step"] + 1, "")


@pytest.mark.parametrize(
    ("how", "reason"), [("file", "the file PREEMPT"), ("usr2", "SIGUSR2"), ("deadline", "the deadline")]
)
def test_every_kind_of_stop_request_ends_with_the_reserved_status(
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


def test_a_run_continues_after_a_requested_save(train: Trainer, tmp_path: Path, digits: Path) -> None:
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
    """Two requests to stop during one long step: the first waits for the end of the step."""
    run = tmp_path / "run"
    process = start(tmp_path, "--data", digits, "--out", run, script=("tests/dist/inject_fault.py", "slow"))
    wait_for_step(run, 1, process)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # counts as the same request
    time.sleep(6)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 128 + signal.SIGTERM
    assert not list((run / "checkpoints").glob("step-*"))
    assert status(run)["status"] == "failed"


def test_ctrl_c_is_answered_during_a_step_and_a_second_one_says_what_is_lost(
    train: Trainer, tmp_path: Path, digits: Path
) -> None:
    run = tmp_path / "run"
    options = (*OPTIONS, "--data", digits, "--out", run, "--save-every", "1")
    process = train.start("blocked", *options, program=INJECT_FAULT)
    wait_for_step(run, 1, process)
    wait_until((run / "checkpoints" / "step-00000001").exists)
    process.send_signal(signal.SIGINT)
    first = "SIGINT: finishing this step, then saving; press Ctrl-C again to stop without saving\n"
    wait_until(lambda: first in train.output())
    process.send_signal(signal.SIGINT)  # too soon for a person
    time.sleep(SAME_KEY_PRESS_SECONDS)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    lost = "nothing is lost, the checkpoint of step 1 contains all steps"
    assert train.output().endswith(f"{first}ended at once; {lost}\n")
    ended = status(run)
    assert (ended["status"], ended["step"], ended["reason"]) == ("failed", 1, f"SIGINT twice: ended at once; {lost}")


def test_a_run_that_is_stopped_before_it_trains_does_not_stay_running(
    train: Trainer, tmp_path: Path, digits: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    process = train.start("start", *OPTIONS, "--data", digits, "--out", run, program=INJECT_FAULT)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert train.output().splitlines()[-1] == "interrupted before training started; nothing is lost"
    stopped = status(run)
    assert (stopped["status"], stopped["step"]) == ("preempted", None)
    assert stopped["reason"] == "SIGTERM before training started"


@pytest.mark.parametrize("average", [(), ("--ema", "0.9")], ids=["weights", "average"])
def test_a_run_preempted_during_an_evaluation_saves_and_evaluates_after_the_restart(
    train: Trainer, tmp_path: Path, digits: Path, average: tuple[str, ...]
) -> None:
    run = tmp_path / "run"
    options = ("--data", digits, "--out", run, "--stop-after", "2", "--eval-batch", "40", *average)
    assert train("stop", *OPTIONS, *options, program=INJECT_FAULT).returncode == 75
    assert lines(run, "eval") == lines(run, "eval-ema") == []
    assert status(run)["step"] == 2
    saved = load_file(run / "checkpoints" / "step-00000002" / "state.safetensors")
    done = train(*OPTIONS, *options)
    assert done.returncode == 0, done.stderr
    kinds = {"eval": ("model", "weights")} | ({"eval-ema": ("ema", "weights-ema")} if average else {})
    for kind, (key, name) in kinds.items():
        assert [(line["step"], line["samples"]) for line in lines(run, kind)] == [(2, 360)]
        weights = load_file(run / f"{name}-last.safetensors")
        assert all(torch.equal(saved[f"{key}/{n}"], w) for n, w in weights.items() if w.is_floating_point())


def test_resume_never_renames_the_old_checkpoints(train: Trainer, tmp_path: Path, digits: Path) -> None:
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
    *options: str | Path,
    kills: int,
    seed: int,
    steps: int,
    worlds: tuple[int, ...],
    recorded: bool = False,
) -> Path:
    """Train `steps` steps in the folder `run`, killing the run `kills` times at random moments and resuming it."""
    chance = random.Random(seed)
    goal = (*OPTIONS, "--data", digits, "--out", run, "--stop-after", str(steps), "--save-every", "2", *options)
    program, kind = (INJECT_FAULT, ("record",)) if recorded else (TRAIN, ())
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
    x, y = load_file(a / "weights-last.safetensors"), load_file(b / "weights-last.safetensors")
    assert x.keys() == y.keys()
    assert all(torch.equal(x[name], y[name]) for name in x)


@pytest.mark.slow
def test_a_run_that_is_killed_twice_ends_with_the_same_weights(train: Trainer, tmp_path: Path, digits: Path) -> None:
    how: dict[str, Any] = {"seed": 1, "steps": 8, "worlds": (1,)}
    whole = killed_and_resumed(train, tmp_path / "whole", digits, kills=0, **how)
    assert_bit_identical(whole, killed_and_resumed(train, tmp_path / "killed", digits, kills=2, **how))


def test_a_killed_run_resumes_from_a_local_checkpoint_with_the_same_weights(
    train: Trainer, tmp_path: Path, digits: Path
) -> None:
    memory = tmp_path / "memory"
    memory.mkdir()
    local = ("--save-every", "100", "--local-checkpoint-every", "1", "--local-checkpoint-dir", memory)
    how: dict[str, Any] = {"seed": 1, "steps": 8, "worlds": (2,)}
    # The same options, because saving averages BatchNorm's statistics over the ranks, which rounds them.
    whole = killed_and_resumed(train, tmp_path / "whole", digits, *local, kills=0, **how)
    killed = killed_and_resumed(train, tmp_path / "killed", digits, *local, kills=2, **how)
    assert_bit_identical(whole, killed)
    shared = [line["step"] for line in lines(killed, "checkpoint") if not line.get("local")]
    assert set(shared) == {1, 8}  # the first one, which the local ones follow, and the last one
    assert max(line["step"] for line in lines(killed, "start")) > 1
    assert list(memory.rglob("step-*")) == []


def test_metrics_of_steps_in_which_the_disk_was_full_survive_a_kill(
    train: Trainer, tmp_path: Path, digits: Path
) -> None:
    """The restart resumes from a local checkpoint, so that it does not repeat these steps."""
    memory = tmp_path / "memory"
    memory.mkdir()

    def local_step() -> int:
        steps = [int(path.name.removeprefix("step-")) for path in memory.glob("*/*/after-*/step-*")]
        return max(steps, default=0)

    def written_step() -> int:
        return int(lines(run, "train")[-1]["step"])

    with small_disk(tmp_path / "disk", "32m") as disk:
        run = disk / "run"
        local = ("--log-every", "7", "--local-checkpoint-every", "1", "--local-checkpoint-dir", memory)
        goal = (*OPTIONS, "--model", "tests.support.models:small_fat", "--data", digits, "--out", run, *local)
        process = train.start(*goal)
        wait_for_step(run, 2, process)
        filler = fill(disk)
        wait_until(lambda: local_step() >= written_step() + 3)  # the last page of metrics.jsonl had room for some lines
        train.kill()
        written = written_step()
        filler.unlink()
        done = train(*goal, "--stop-after", str(local_step() + 3))
        assert done.returncode == 0, done.stderr
        trained = [line for line in final_timeline(read_metrics(run)) if line["kind"] == "train"]
        assert lines(run, "start")[-1]["step"] > written
    assert [line["step"] for line in trained] == list(range(1, len(trained) + 1))
    assert {line["steps"] for line in trained} == {1}  # also without --log-every 1: a line at each local checkpoint


@pytest.mark.slow
def test_a_killed_run_of_three_ranks_ends_with_the_same_weights(train: Trainer, tmp_path: Path, digits: Path) -> None:
    """Of three gradients, unlike of two, the order in which they are added matters."""
    how: dict[str, Any] = {"seed": 1, "steps": 6, "worlds": (3,)}
    # A small model, of which many parameters change their place when DDP arranges its buckets.
    small = ("--model", "tests.support.models:small_fat", "--global-batch", "48", "--zero", "0")
    whole = killed_and_resumed(train, tmp_path / "whole", digits, *small, kills=0, **how)
    killed = killed_and_resumed(train, tmp_path / "killed", digits, *small, kills=2, **how)
    assert max(line["step"] for line in lines(killed, "start")) > 0
    assert_bit_identical(whole, killed)


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
def test_ten_kills_with_changing_world_sizes_change_neither_batches_nor_weights(
    train: Trainer, tmp_path: Path, digits: Path
) -> None:
    """In float32 with a constant learning rate and frozen BatchNorm, only the order of summation differs."""
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
    x, y = load_file(whole / "weights-last.safetensors"), load_file(killed / "weights-last.safetensors")
    names = [name for name in x if x[name].is_floating_point()]
    a, b = (torch.cat([weights[name].double().flatten() for name in names]) for weights in (x, y))
    assert float((a - b).norm() / a.norm()) < 1e-4


def test_steps_with_nan_images_are_skipped_and_counted_until_the_run_fails(
    train: Trainer, tmp_path: Path, digits: Path
) -> None:
    options = (*OPTIONS, "--data", digits, "--out", tmp_path / "run", "--max-bad-steps", "3", "--stop-after", "9")
    done = train("nan", *options, program=INJECT_FAULT)
    assert done.returncode == 1
    assert "step 3: non-finite gradients; the update was skipped" in done.stderr
    assert "error: 3 steps in a row, up to step 8, had non-finite gradients (rank 0: samples" in done.stderr
    assert status(tmp_path / "run")["status"] == "failed"
    assert [line["skipped"] for line in lines(tmp_path / "run", "train")] == [0, 0, 1, 1, 1, 2, 3]


def test_differing_weights_between_ranks_are_detected(train: Trainer, tmp_path: Path, digits: Path) -> None:
    options = (*OPTIONS, "--data", digits, "--out", tmp_path / "run", "--compare-every", "2", "--stop-after", "6")
    done = train("drift", *options, program=INJECT_FAULT, ranks=2)
    assert done.returncode != 0
    assert "error: step 4: the weights differ between ranks" in done.stderr


def test_a_full_disk_costs_neither_the_run_nor_its_checkpoints(train: Trainer, tmp_path: Path, digits: Path) -> None:
    """A file size limit simulates a full disk: the same write fails, only with another errno."""
    run = tmp_path / "run"
    options = (*OPTIONS, "--data", digits, "--out", run, "--save-every", "2", "--stop-after", "6")
    done = train("disk", *options, program=INJECT_FAULT)
    assert done.returncode == 0, done.stderr
    assert "warning: " in done.stderr
    assert "step-00000004: checkpoint not written" in done.stderr
    assert [line["step"] for line in lines(run, "train")] == [1, 2, 3, 4, 5, 6]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000002", "step-00000006"]


def test_an_unwritable_run_folder_is_rejected_at_the_start(train: Trainer, tmp_path: Path, digits: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = train(*OPTIONS, "--data", digits, "--out", tmp_path / "file" / "run")
    assert done.returncode == 2
    assert "the run folder cannot be written" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_save_blocks_training_only_briefly(tmp_path: Path) -> None:
    done = python(tmp_path, "tests/dist/inject_fault.py", "stall", "--variant", "b3")
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    assert measured["megabytes"] > 300
    # The target is 50 ms per 100 MB; the limit is twice that, for a busy machine.
    assert measured["milliseconds_per_100_megabytes"] < 100

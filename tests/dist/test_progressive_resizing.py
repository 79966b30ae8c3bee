"""Trainings whose image size changes, killed within a phase and resumed: the same samples, metrics and weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fat
from tests.dist.forked import Launcher
from tests.dist.trainings import TRAIN, Trainer
from tests.support.launching import lines
from tests.support.runs import wait_for_step

INJECT_FAULT = "tests.dist.inject_fault"
STEPS, PHASES = 44, {0: 32, 14: 64, 31: 32}  # 2 epochs of 22 steps
OPTIONS = (
    *("--model", "tests.support.models:small", "--global-batch", "64", "--epochs", "2", "--warmup-epochs", "0"),
    *("--size", "32", "--size-schedule", "0:32,30:32,30:64,70:64,70:32", "--micro-batch-schedule", "64:8"),
    *("--augment", "fat", "--save-every", "2", "--log-every", "1"),
)
RECALIBRATED = ("--ema", "0.9", "--recalibrate-bn", "5", "--eval-size", "64")
WEIGHTS = ("weights-last.safetensors", "weights-ema-last.safetensors")


def interrupted(train: Trainer, run: Path, *options: str | Path, worlds: tuple[int, int], recorded: bool) -> Path:
    """Kill a training within its second phase, and resume it with another number of ranks."""
    program, kind = (INJECT_FAULT, ("record",)) if recorded else (TRAIN, ())
    process = train.start(*kind, *options, "--out", run, program=program, ranks=worlds[0])
    wait_for_step(run, 17, process)
    train.kill()
    done = train(*kind, *options, "--out", run, program=program, ranks=worlds[1])
    assert done.returncode == 0, done.stderr
    first, resumed = lines(run, "start")
    assert (first["step"], first["world"], resumed["world"]) == (0, *worlds)
    assert 14 < resumed["step"] < 31, "the second phase"
    return run


def size_of(step: int) -> int:
    return next(size for first, size in reversed(PHASES.items()) if first <= step)


def trained(run: Path) -> dict[int, dict[str, Any]]:
    """Return the loss, gradient norm and image size of each step."""
    return {line["step"]: {name: line[name] for name in ("loss", "grad_norm", "size")} for line in lines(run, "train")}


def evaluated(run: Path, kind: str) -> list[tuple[int, float, float]]:
    return [(line["step"], line["top1"], line["loss"]) for line in lines(run, kind)]


def fed(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in run.glob("fed-*.jsonl") for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(launch: Launcher, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of an uninterrupted training."""
    run = tmp_path_factory.mktemp("whole") / "run"
    done = Trainer(launch)(*OPTIONS, *RECALIBRATED, "--data", digits, "--out", run)
    assert done.returncode == 0, done.stderr
    return run


def test_a_kill_within_a_phase_changes_no_bit(train: Trainer, tmp_path: Path, digits: Path, whole: Path) -> None:
    sizes = {step: line["size"] for step, line in trained(whole).items()}
    assert sizes == {step + 1: size_of(step) for step in range(STEPS)}
    options = (*OPTIONS, *RECALIBRATED, "--data", digits)
    killed = interrupted(train, tmp_path / "killed", *options, worlds=(1, 1), recorded=False)
    assert trained(killed) == trained(whole)
    for kind in ("eval", "eval-ema"):
        assert evaluated(killed, kind) == evaluated(whole, kind)
    for name in WEIGHTS:
        one, other = load_file(whole / name), load_file(killed / name)
        assert all(torch.equal(one[key], other[key]) for key in one)
        assert fat.read_info(killed / name).size == 64, "the size of evaluation"


def test_recalibration_changes_only_statistics_and_only_at_the_end(
    train: Trainer, tmp_path: Path, digits: Path, whole: Path
) -> None:
    run = tmp_path / "run"
    done = train(*OPTIONS, *RECALIBRATED, "--recalibrate-bn", "0", "--data", digits, "--out", run)
    assert done.returncode == 0, done.stderr
    assert trained(run) == trained(whole)
    for name in WEIGHTS:
        before, after = load_file(run / name), load_file(whole / name)
        changed = {key for key in before if not torch.equal(before[key], after[key])}
        assert changed >= {"1.running_mean", "1.running_var"}
        assert all("running" in key or "num_batches" in key for key in changed)
    for kind in ("eval", "eval-ema"):
        (first, last), (other_first, other_last) = evaluated(run, kind), evaluated(whole, kind)
        assert first == other_first
        assert last != other_last


@pytest.mark.slow
@pytest.mark.parametrize("worlds", [(2, 1), (1, 4)])
def test_a_kill_and_another_world_size_change_neither_batches_nor_weights(
    train: Trainer, tmp_path: Path, digits: Path, worlds: tuple[int, int]
) -> None:
    """In float32 with a constant learning rate and frozen BatchNorm, only the order of summation differs."""
    constant = ("--lr", "1e-3", "--min-lr", "1e-3", "--freeze-bn", "--data", digits)
    done = train("record", *OPTIONS, *constant, "--out", tmp_path / "whole", program=INJECT_FAULT)
    assert done.returncode == 0, done.stderr
    killed = interrupted(train, tmp_path / "killed", *OPTIONS, *constant, worlds=worlds, recorded=True)
    reference = {entry["step"]: entry for entry in fed(tmp_path / "whole")}
    entries = fed(killed)
    assert {entry["world"] for entry in entries} == set(worlds)
    assert {entry["step"] for entry in entries} == set(range(STEPS))
    for entry in entries:
        rows = len(entry["ids"])
        own = slice(entry["rank"] * rows, (entry["rank"] + 1) * rows)
        assert entry["ids"] == reference[entry["step"]]["ids"][own]
        assert entry["pixels"] == reference[entry["step"]]["pixels"][own]
    x, y = (load_file(run / "weights-last.safetensors") for run in (tmp_path / "whole", killed))
    a, b = (torch.cat([weights[name].double().flatten() for name in x]) for weights in (x, y))
    assert float((a - b).norm() / a.norm()) < 1e-4

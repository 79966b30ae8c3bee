"""--target-top1 ends a run after the evaluation that reaches it, exactly, also when the run is resumed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from launch.monitor.time_to_accuracy import time_to_accuracy
from launch.report.loaded_run import load_runs
from launch.report.summary import summarize
from launch.run.metrics_file import read_metrics
from launch.run.status import read_content, write_status
from launch.train import main as train
from shards.convert.convert import convert
from shards.convert.options import Options
from tests.support.commands import run

OPTIONS = (
    *("--model", "tests.support.models:with_classifier", "--size", "32", "--augment", "light", "--compile", "off"),
    *("--epochs", "3", "--warmup-epochs", "0", "--global-batch", "32", "--classes-subset", "3", "--fraction", "0.3"),
)
STEPS = 4
"""Optimizer steps per epoch."""


def kinds(out: Path) -> list[str]:
    return [line["kind"] for line in read_metrics(out) if line["kind"] not in ("train", "resolved", "checkpoint")]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "weights-last.safetensors")


@pytest.fixture(scope="module")
def complete(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three epochs without a target."""
    out = tmp_path_factory.mktemp("complete") / "run"
    assert run(train, *OPTIONS, "--data", digits, "--out", out) == 0
    return out


@pytest.fixture(scope="module")
def reached(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three epochs that reaches its target in the first evaluation."""
    out = tmp_path_factory.mktemp("reached") / "run"
    assert run(train, *OPTIONS, "--data", digits, "--out", out, "--target-top1", "0.01") == 0
    return out


@pytest.fixture
def copy(reached: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(reached, tmp_path / "run"))


def test_the_run_finishes_with_weights_after_the_evaluation_that_reaches_the_target(reached: Path) -> None:
    content = read_content(reached)
    assert content is not None
    assert (content.status, content.step) == ("finished", STEPS)
    assert {path.name for path in reached.glob("weights-*")} == {
        "weights-best.safetensors",
        "weights-last.safetensors",
    }
    assert (reached / "hardest.jpg").exists()


def test_the_metrics_have_the_marks_of_the_clock(reached: Path) -> None:
    assert kinds(reached) == ["start", "run_start", "epoch_stop", "eval", "run_stop", "end"]
    lines = {line["kind"]: line for line in read_metrics(reached)}
    assert (lines["run_start"]["clock"], lines["run_start"]["target_top1"]) == (0.0, 0.01)
    assert lines["run_stop"]["status"] == "success"
    clocks = [lines[kind]["clock"] for kind in ("run_start", "epoch_stop", "eval", "run_stop")]
    assert clocks == sorted(clocks)
    assert clocks[-1] <= lines["end"]["seconds"] + 0.1
    found = time_to_accuracy(read_metrics(reached))
    assert found is not None
    assert (found.seconds, found.step, found.epoch) == (lines["eval"]["clock"], STEPS, 1)


def test_the_report_shows_the_time_to_accuracy(reached: Path, complete: Path) -> None:
    shown, without = (summarize(run) for run in load_runs([reached, complete]))
    assert shown.facts["Time to accuracy"].startswith("1.00% in ")
    assert "Time to accuracy" not in without.facts


def test_starting_again_does_nothing(digits: Path, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (copy / "metrics.jsonl").read_bytes()
    assert run(train, *OPTIONS, "--data", digits, "--out", copy, "--target-top1", "0.01") == 0
    assert "already finished: 4 steps, best top-1" in capsys.readouterr().err
    assert (copy / "metrics.jsonl").read_bytes() == before


def test_a_run_that_has_done_all_steps_needs_more_epochs_and_not_another_target(
    digits: Path, complete: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(train, *OPTIONS, "--data", digits, "--out", complete, "--target-top1", "0.01") == 0
    assert "to train longer, run the same command with --epochs 4 or more" in capsys.readouterr().err


def test_a_start_that_was_killed_after_its_last_save_is_finished_without_further_steps(
    digits: Path, copy: Path
) -> None:
    write_status(copy, "running", step=STEPS)
    for path in copy.glob("weights-*"):
        path.unlink()
    before = kinds(copy)
    assert run(train, *OPTIONS, "--data", digits, "--out", copy, "--target-top1", "0.01") == 0
    assert kinds(copy) == [*before, "start", "run_start", "end"]
    content = read_content(copy)
    assert content is not None
    assert content.status == "finished"
    assert weights(copy)


def test_a_finished_run_continues_without_the_target_as_if_it_had_never_had_one(
    digits: Path, copy: Path, complete: Path
) -> None:
    assert run(train, *OPTIONS, "--data", digits, "--out", copy) == 0
    expected, found = weights(complete), weights(copy)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    clock = [line["clock"] for line in read_metrics(copy) if "clock" in line]
    assert clock == sorted(clock), "the clock continues"


def test_a_target_that_is_not_reached_changes_nothing_but_the_last_mark(
    digits: Path, complete: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run(train, *OPTIONS, "--data", digits, "--out", out, "--target-top1", "1") == 0
    assert "--target-top1 1 was not reached: best top-1" in capsys.readouterr().err
    stop = [line for line in read_metrics(out) if line["kind"] == "run_stop"]
    assert [(line["status"], line["step"]) for line in stop] == [("aborted", 3 * STEPS)]
    assert all(torch.equal(weights(out)[name], tensor) for name, tensor in weights(complete).items())


def test_a_target_needs_a_validation_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(8):
        path = tmp_path / "source" / "train" / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (number, 9, 9)).save(path)
    convert(tmp_path / "source", tmp_path / "set", Options())
    options = ("--size", "32", "--global-batch", "4", "--data", tmp_path / "set", "--out", tmp_path / "run")
    assert run(train, *options, "--target-top1", "0.5") == 2
    error = capsys.readouterr().err
    assert f"error: --target-top1: {tmp_path / 'set'} has no validation split" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", ["0", "76", "-1"])
def test_targets_are_fractions(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(train, "--target-top1", value, "--dry-run") == 2
    assert "--target-top1" in capsys.readouterr().err


def test_the_dry_run_shows_the_target(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--data", digits, "--out", tmp_path / "run", "--target-top1", "0.985", "--dry-run")
    assert run(train, *OPTIONS, *options) == 0
    assert "after the first evaluation with top-1 of at least 98.50%" in capsys.readouterr().out

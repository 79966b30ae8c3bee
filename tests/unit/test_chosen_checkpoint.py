"""Complete runs that return to a checkpoint, branch from one, or are extended: exact weights, metrics and messages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fat
from launch.config.command_line import parse
from launch.engine.engine import Engine
from launch.monitor.goodput_table import read_goodput
from launch.monitor.panels import Timeline
from launch.monitor.time_to_accuracy import time_to_accuracy
from launch.report.loaded_run import load_runs
from launch.report.summary import summarize
from launch.run.metrics_file import final_timeline, read_metrics
from launch.run.status import read_content
from launch.train import main as train
from tests.support.commands import run

OPTIONS = (
    *("--model", "tests.support.models:with_classifier", "--size", "32", "--augment", "light", "--compile", "off"),
    *("--warmup-epochs", "0", "--global-batch", "32", "--classes-subset", "3", "--fraction", "0.3", "--log-every", "1"),
    *("--lr", "0.01", "--ema", "0.9", "--save-every", "2", "--keep", "20"),
)
EPOCHS = ("--epochs", "3")
STEPS = 4
"""Optimizer steps per epoch."""
LAST = 3 * STEPS


@pytest.fixture(scope="module")
def whole(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three epochs, with a checkpoint after every second step."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert run(train, *OPTIONS, *EPOCHS, "--data", digits, "--out", out) == 0
    return out


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def same_weights(found: Path, expected: Path, name: str = "weights-last") -> bool:
    one, other = (load_file(out / f"{name}.safetensors") for out in (found, expected))
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))


def begun(out: Path) -> list[int]:
    """Return the step from which each start began."""
    return [line["step"] for line in read_metrics(out) if line["kind"] == "start"]


def trained(out: Path) -> list[int]:
    return [line["step"] for line in final_timeline(read_metrics(out)) if line["kind"] == "train"]


@pytest.mark.parametrize("step", [2, 6, 8])
def test_a_run_that_returns_to_a_step_and_continues_equals_the_run_bit_by_bit(
    digits: Path, whole: Path, copy: Path, step: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(train, *OPTIONS, *EPOCHS, "--data", digits, "--out", copy, "--resume", f"step:{step}") == 0
    assert f"resuming from {copy / 'checkpoints'}/step-{step:08d}" in capsys.readouterr().err
    names = ["weights-last", "weights-best", "weights-ema-last", "weights-ema-best"]
    assert [same_weights(copy, whole, name) for name in names] == [True] * 4
    assert [fat.read_info(copy / f"{name}.safetensors").step for name in names] == [
        fat.read_info(whole / f"{name}.safetensors").step for name in names
    ]
    assert steps(copy / "checkpoints-before-1") == list(range(step + 2, LAST + 1, 2))
    assert steps(copy / "checkpoints") == steps(whole / "checkpoints")
    assert begun(copy) == [0, step]
    assert trained(copy) == list(range(1, LAST + 1))
    before, after = (Timeline("", read_metrics(out)).best() for out in (whole, copy))
    assert before == after
    content = read_content(copy)
    assert content is not None
    assert (content.status, content.step, (content.best, content.best_of)) == ("finished", LAST, after)


def test_files_of_later_steps_are_moved_and_no_others(
    digits: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is moved is named, and weights of later steps are replaced by the best ones of earlier steps."""
    files = {path.name: fat.read_info(path).step or 0 for path in copy.glob("weights-*.safetensors")}
    assert len(files) == 4
    stop = ("--stop-after", "6")
    assert run(train, *OPTIONS, *EPOCHS, *stop, "--data", digits, "--out", copy, "--resume", "step:6") == 0
    moved = sorted(path.name for path in (copy / "checkpoints-before-1").iterdir())
    later = ["evaluation.safetensors", "hardest.jpg", *(f"step-{step:08d}" for step in (8, 10, 12))]
    assert moved == sorted([*later, *(name for name, step in files.items() if step > 6)])
    assert len(moved) > len(later) + 2, "also files of the best weights were moved, or this test checks little"
    said = capsys.readouterr().err
    assert all(name in said for name in moved)
    for name in ("weights-best", "weights-ema-best"):  # of the only evaluation that is left, after the first epoch
        assert fat.read_info(copy / f"{name}.safetensors").step == STEPS
    assert fat.read_info(copy / "weights-last.safetensors").step == 6


def test_the_same_command_again_resumes_the_new_history(
    digits: Path, copy: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (*OPTIONS, *EPOCHS, "--data", digits, "--out", copy, "--resume", "step:6")
    assert run(train, *options, "--stop-after", "8") == 0
    capsys.readouterr()
    assert run(train, *options) == 0
    assert "returned to step 6 already, so it resumes from its newest checkpoint" in capsys.readouterr().err
    assert begun(copy) == [0, 6, 8]
    assert same_weights(copy, whole)
    assert run(train, *options) == 0
    assert "already finished: 12 steps" in capsys.readouterr().err
    assert run(train, *options[:-1], "step:10") == 0, "another step is another request"
    assert begun(copy) == [0, 6, 8, 10]
    (copy / "origin.json").unlink()
    assert run(train, *options) == 0
    assert begun(copy) == [0, 6, 8, 10, 6]
    assert same_weights(copy, whole)
    archives = sorted(path.name for path in copy.glob("checkpoints-before-*"))
    assert archives == [f"checkpoints-before-{number}" for number in (1, 2, 3)]


def test_best_chooses_the_checkpoint_with_the_best_accuracy(digits: Path, copy: Path) -> None:
    best = max((line for line in read_metrics(copy) if line["kind"].startswith("eval")), key=lambda line: line["top1"])
    options = ("--stop-after", str(LAST), "--resume", "best", "--epochs", "4")
    assert run(train, *OPTIONS, *options, "--data", digits, "--out", copy) == 0
    assert begun(copy) == [0, best["step"]]


def test_a_branch_with_the_same_recipe_equals_the_run_bit_by_bit(
    digits: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = whole / "checkpoints" / "step-00000006", tmp_path / "branch"
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    options = (*OPTIONS, *EPOCHS, "--data", digits, "--out", out, "--resume", source)
    assert run(train, *options) == 0
    said = capsys.readouterr().err
    assert f"branching from step 6 of {source} into {out}" in said
    assert "warning:" not in said
    assert same_weights(out, whole)
    assert same_weights(out, whole, "weights-ema-last")
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before, "the source does not change"
    assert trained(out) == list(range(7, LAST + 1))
    digest = json.loads((source / "meta.json").read_text())["files"]["state.safetensors"]["xxh3"]
    start = read_metrics(out)[0]
    assert (start["origin"], start["origin_digest"], start["step"]) == (str(source), digest, 6)
    clock = next(line["clock"] for line in read_metrics(out) if line["kind"] == "run_start")
    assert clock == pytest.approx(json.loads((source / "meta.json").read_text())["progress"]["seconds"], abs=1e-3)
    branch = json.loads((out / "recipe.json").read_text())["origins"]["branch"]
    assert (branch["checkpoint"], branch["step"], branch["digest"]) == (str(source), 6, digest)
    facts = summarize(load_runs([out])[0]).facts
    assert facts["Branched from"] == f"{source}, step 6"
    capsys.readouterr()
    assert run(train, *options) == 0, "the same command again"
    assert "already finished: 12 steps" in capsys.readouterr().err


def test_a_branch_of_a_run_folder_begins_with_its_newest_checkpoint_and_is_resumed(
    digits: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "branch"
    options = (*OPTIONS, "--epochs", "5", "--data", digits, "--out", out, "--resume", whole)
    for stop in (14, 16):
        assert run(train, *options, "--stop-after", stop) == 0
    assert begun(out) == [LAST, 14]
    best = Timeline("", read_metrics(out)).best()
    content = read_content(out)
    assert content is not None
    assert content.best is not None
    assert best is not None
    assert content.best >= best[0]


CONSTANT = ("--schedule", "constant")


@pytest.fixture(scope="module")
def constant(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs with a constant learning rate."""
    out = tmp_path_factory.mktemp("constant") / "run"
    assert run(train, *OPTIONS, *CONSTANT, "--epochs", "2", "--data", digits, "--out", out) == 0
    return out


def test_an_extended_run_with_a_constant_rate_equals_the_longer_run_bit_by_bit(
    digits: Path, constant: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its batches are those of the later epochs of the longer run."""
    batches: dict[int, list[int]] = {}
    step = Engine.step

    def recorded(self: Engine, *args, **kwargs):  # type: ignore[no-untyped-def]
        batches[kwargs["step"]] = [sample for batch in args[0] for sample in batch.ids.tolist()]
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Engine, "step", recorded)
    longer, extended = tmp_path / "longer", Path(shutil.copytree(constant, tmp_path / "extended"))
    assert run(train, *OPTIONS, *CONSTANT, "--epochs", "4", "--data", digits, "--out", longer) == 0
    expected = {each: batches[each] for each in range(2 * STEPS, 4 * STEPS)}
    batches.clear()
    assert run(train, *OPTIONS, *CONSTANT, "--epochs", "4", "--data", digits, "--out", extended) == 0
    assert batches == expected
    assert same_weights(extended, longer)
    assert same_weights(extended, longer, "weights-ema-last")


def test_extending_a_finished_run_says_how_the_rate_changes(
    digits: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(train, *OPTIONS, *EPOCHS, "--data", digits, "--out", copy) == 0
    advice = "to train longer, run the same command with --epochs 4 or more"
    assert advice in capsys.readouterr().err
    assert run(train, *OPTIONS, "--epochs", "5", "--data", digits, "--out", copy) == 0
    said = capsys.readouterr().err
    assert "warning: epochs was 3, now 5; the run continues with the new value" in said
    rates = {line["step"]: line["lr"] for line in read_metrics(copy) if line["kind"] == "train"}
    assert (
        f"learning rate: {rates[LAST]:.3e} in step 12, {rates[LAST + 1]:.3e} in the next one; the schedule is now "
        "cosine over 5 epochs, before cosine over 3 epochs"
    ) in said
    assert rates[LAST + 1] > 10 * rates[LAST]
    content = read_content(copy)
    assert content is not None
    assert (content.status, content.step) == ("finished", 5 * STEPS)


def test_the_metrics_of_an_extended_run_are_read_as_one_run(digits: Path, copy: Path) -> None:
    assert run(train, *OPTIONS, "--epochs", "4", "--data", digits, "--out", copy, "--target-top1", "0.999") == 0
    lines = read_metrics(copy)
    assert [line["step"] for line in lines if line["kind"] == "run_stop"] == [LAST, 4 * STEPS]
    assert trained(copy) == list(range(1, 4 * STEPS + 1))
    found = read_goodput(copy, print)
    assert [start.ended for start in found.starts] == ["finished", "finished"]
    assert found.lost_steps == 0
    assert found.categories["down time"] == 0
    race = time_to_accuracy(lines)
    assert race is not None
    assert race.target == 0.999
    summary = summarize(load_runs([copy])[0])
    assert (summary.step, summary.epoch, summary.starts) == ("16 of 16", "epoch 4 of 4", "2 starts")


def test_an_unfinished_run_may_become_shorter_but_not_shorter_than_its_progress(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (*OPTIONS, "--data", digits, "--out", tmp_path / "run")
    assert run(train, *options, "--epochs", "5", "--stop-after", "6") == 0
    assert run(train, *options, "--epochs", "1") == 2
    fact = "error: --epochs 1: the run has done 6 steps, which is more than the 4 of 1 epoch; use at least --epochs 2"
    assert f"{fact}, or return to an earlier checkpoint with --resume step:N" in capsys.readouterr().err
    assert run(train, *options, "--epochs", "2") == 0
    assert trained(tmp_path / "run") == list(range(1, 2 * STEPS + 1))


def test_statistics_that_were_recalibrated_do_not_change_the_parameters_of_an_extended_run(
    digits: Path, tmp_path: Path
) -> None:
    """BatchNorm uses its statistics in evaluations only, so training continues as if they had not been replaced."""
    options = (*OPTIONS, *CONSTANT, "--data", digits, "--recalibrate-bn", "2")
    for epochs in (1, 2):
        assert run(train, *options, "--epochs", epochs, "--out", tmp_path / "extended") == 0
    assert run(train, *options, "--epochs", "2", "--out", tmp_path / "longer") == 0
    assert same_weights(tmp_path / "extended", tmp_path / "longer")


def test_image_sizes_of_an_extended_run_follow_its_number_of_epochs(digits: Path, tmp_path: Path) -> None:
    """A schedule in percent: of two epochs, the second has large images; of four, the last two."""
    options = (*OPTIONS, *CONSTANT, "--data", digits, "--out", tmp_path / "run")
    options = (*options, "--size", "64", "--size-schedule", "0:32,50:32,50:64")
    for epochs in (2, 4):
        assert run(train, *options, "--epochs", epochs) == 0
    sizes = [line["size"] for line in final_timeline(read_metrics(tmp_path / "run")) if line["kind"] == "train"]
    assert sizes == [32] * STEPS + [64] * STEPS * 3


def test_a_recipe_of_another_run_does_not_choose_a_checkpoint(digits: Path, copy: Path) -> None:
    options = (*OPTIONS, *EPOCHS, "--data", digits)
    assert run(train, *options, "--out", copy, "--resume", "step:10") == 0
    saved = json.loads((copy / "recipe.json").read_text())
    assert saved["recipe"]["checkpoint"]["resume"] == "step:10"
    recipe = parse(["--recipe", str(copy / "recipe.json")])
    assert (recipe.checkpoint.resume, recipe.checkpoint.keep, recipe.optim.epochs) == ("auto", 20, 3)


def test_a_dry_run_names_damaged_checkpoints(digits: Path, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def dry_run(*options: object) -> str:
        assert run(train, *OPTIONS, "--data", digits, "--dry-run", "--out", copy, *options) == 0
        return capsys.readouterr().out

    def damage(step: int, name: str = "meta.json") -> None:
        (copy / "checkpoints" / f"step-{step:08d}" / name).write_text("{")

    damage(LAST)
    skipped = "warning: " + str(copy / "checkpoints" / f"step-{LAST:08d}")
    said = dry_run(*EPOCHS)
    assert skipped in said
    assert f"resuming from {copy / 'checkpoints' / f'step-{LAST - 2:08d}'}, after {LAST - 2} of {LAST} steps" in said
    said = dry_run("--epochs", "1")
    assert skipped in said
    assert "warning: the run cannot resume: " in said
    for step in range(2, LAST, 2):
        damage(step, "state.safetensors")
    said = dry_run(*EPOCHS, "--local-checkpoint-every", "1")  # follows a checkpoint of which only the state is damaged
    assert said.count("; skipped") == LAST // 2
    assert "if the host of rank 0 has a newer local checkpoint, it is used instead" in said
    assert f"starting in {copy}, whose checkpoints and metrics would be moved to" in said
    for step in range(2, LAST, 2):
        damage(step)
    said = dry_run(*EPOCHS, "--local-checkpoint-every", "1")
    assert said.count("; skipped") == LAST // 2
    assert "local checkpoint" not in said
    assert f"starting in {copy}, whose checkpoints and metrics would be moved to" in said
    said = dry_run(*EPOCHS, "--resume", "never")
    assert "; skipped" not in said


def test_a_dry_run_shows_the_checkpoint_and_writes_nothing(
    digits: Path, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def dry_run(*options: object) -> str:
        assert run(train, *OPTIONS, "--data", digits, "--dry-run", *options) == 0
        return capsys.readouterr().out

    before = sorted(copy.rglob("*"))
    said = dry_run(*EPOCHS, "--out", copy, "--resume", "step:6")
    assert f"resuming from {copy / 'checkpoints' / 'step-00000006'}, after 6 of 12 steps" in said
    assert "the checkpoints of the steps 8, 10, 12, and weights and evaluations of later steps would be moved" in said
    said = dry_run("--epochs", "4", "--out", copy)
    assert f"resuming from {copy / 'checkpoints' / 'step-00000012'}, after 12 of 16 steps" in said
    assert "the schedule is now cosine over 4 epochs, before cosine over 3 epochs" in said
    assert "local checkpoint" not in said
    said = dry_run("--epochs", "4", "--out", copy, "--local-checkpoint-every", "5")
    assert "if the host of rank 0 has a newer local checkpoint, it is used instead" in said
    said = dry_run("--epochs", "4", "--out", tmp_path / "new", "--resume", copy)
    assert f"branching from step 12 of {copy / 'checkpoints' / 'step-00000012'} into {tmp_path / 'new'}" in said
    assert dry_run(*EPOCHS, "--out", tmp_path / "new").startswith("dry run of")
    options = (*OPTIONS, *EPOCHS, "--data", digits, "--dry-run", "--out", tmp_path / "new", "--resume", copy)
    assert run(train, *options) == 2
    assert "the run ends after step 12, but the checkpoint is that of step 12" in capsys.readouterr().err
    assert sorted(copy.rglob("*")) == before
    assert not (tmp_path / "new").exists()

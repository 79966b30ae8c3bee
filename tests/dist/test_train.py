"""Complete training runs, started with accelerate like in the README or forked from a running process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launch.run.evaluation_record import read_evaluation
from shards.format.dataset import ShardSet
from tests.dist.trainings import Trainer
from tests.support.launching import accelerate, lines
from tests.support.runs import status

# A short training that reaches about 98 %: the recipe of the demo with half the image size and a fifth of the epochs.
SHORT = ("--recipe", "launch/recipes/digits.toml", "--size", "32", "--epochs", "4", "--warmup-epochs", "1")
FEW_STEPS = ("--recipe", "launch/recipes/digits.toml", "--size", "32", "--log-every", "1")


def accuracy(run: Path) -> float:
    last = lines(run, "eval")[-1]
    assert last["samples"] == 360  # every validation image, once
    return float(last["top1"])


def engine_of(run: Path) -> dict[str, object]:
    engine = json.loads((run / "recipe.json").read_text())["engine"]
    return {name: engine[name] for name in ("zero", "precision", "world")}


@pytest.fixture(scope="module")
def alone(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> float:
    """Accuracy of training in one process."""
    folder = tmp_path_factory.mktemp("alone")
    done = accelerate(folder, *SHORT, "--data", digits, "--out", folder / "run")
    assert done.returncode == 0, done.stderr
    return accuracy(folder / "run")


def test_one_process_learns_the_digits(alone: float) -> None:
    assert alone > 0.96


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 1])
def test_two_ranks_learn_as_well_as_one(tmp_path: Path, digits: Path, alone: float, zero: int) -> None:
    run = tmp_path / "run"
    done = accelerate(tmp_path, *SHORT, "--data", digits, "--out", run, "--zero", str(zero), ranks=2)
    assert done.returncode == 0, done.stderr
    assert engine_of(run) == {"zero": zero, "precision": "fp32", "world": 2}
    assert abs(accuracy(run) - alone) <= 0.015


def test_defaults_choose_engine_and_precision_by_the_device(tmp_path: Path, digits: Path) -> None:
    run = tmp_path / "run"
    done = accelerate(tmp_path, *FEW_STEPS, "--data", digits, "--out", run, "--stop-after", "2")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "empty-hf-home" / "accelerate").exists()
    assert engine_of(run) == {"zero": 0, "precision": "fp32", "world": 1}
    assert [line["step"] for line in lines(run, "train")] == [1, 2]


def test_zero_1_with_bf16(tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, extensions = tmp_path / "run", tmp_path / "extensions"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(extensions))
    options = (*FEW_STEPS, "--data", digits, "--out", run, "--stop-after", "4", "--zero", "1", "--precision", "bf16")
    done = accelerate(tmp_path, *options, ranks=2)
    assert done.returncode == 0, done.stderr
    assert engine_of(run) == {"zero": 1, "precision": "bf16", "world": 2}
    assert lines(run, "train")[-1]["loss"] < lines(run, "train")[0]["loss"]
    weights = load_file(run / "weights-last.safetensors")
    assert {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()} == {torch.float32}
    assert not extensions.exists(), "DeepSpeed has compiled an extension, which takes a minute"


def test_a_resumed_run_equals_an_uninterrupted_run_bit_by_bit(train: Trainer, tmp_path: Path, digits: Path) -> None:
    def weights(name: str, *stops: int) -> dict[str, torch.Tensor]:
        for stop in stops:
            options = (*FEW_STEPS, "--data", digits, "--out", tmp_path / name, "--stop-after", str(stop))
            done = train(*options, "--augment", "fat", "--drop-path", "0.1")
            assert done.returncode == 0, done.stderr
        return load_file(tmp_path / name / "weights-last.safetensors")

    whole, resumed = weights("whole", 5), weights("resumed", 3, 5)
    assert [line["step"] for line in lines(tmp_path / "resumed", "start")] == [0, 3]
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_run_is_not_resumed_with_another_recipe(train: Trainer, tmp_path: Path, digits: Path) -> None:
    options = (*FEW_STEPS, "--data", digits, "--out", tmp_path / "run")
    assert train(*options, "--stop-after", "1").returncode == 0
    done = train(*options, "--stop-after", "2", "--global-batch", "32")
    assert done.returncode == 2
    assert "global_batch was 64, now 32" in done.stderr
    assert "Traceback" not in done.stderr
    assert status(tmp_path / "run")["status"] == "finished", "a start that is refused does not change the run"


def test_a_world_size_that_does_not_divide_the_batch_fails_with_status_2(tmp_path: Path, digits: Path) -> None:
    done = accelerate(tmp_path, *FEW_STEPS, "--data", digits, "--out", tmp_path / "run", ranks=3)
    assert done.returncode != 0
    fact = "world size 3 does not divide the global batch of 64"
    assert f"error: {fact}; the nearest world sizes that do: 2 and 4" in done.stderr
    assert "exitcode  : 2" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_record_of_an_evaluation_has_every_image_once(
    train: Trainer, tmp_path: Path, digits: Path, ranks: int
) -> None:
    """With batches of 7 of the 360 images, so that the last batch of a rank has padding rows."""
    options = (*FEW_STEPS, "--data", digits, "--out", tmp_path / "run", "--stop-after", "2", "--eval-batch", "7")
    done = train(*options, "--ema", "0.5", ranks=ranks)
    assert done.returncode == 0, done.stderr
    evaluations = {kind: lines(tmp_path / "run", kind)[-1] for kind in ("eval", "eval-ema")}
    better = max(evaluations, key=lambda kind: evaluations[kind]["top1"])  # the weights, if both are equal
    record = read_evaluation(tmp_path / "run")
    assert record is not None
    assert (record.step, record.weights) == (2, {"eval": "weights", "eval-ema": "average"}[better])
    assert record.ids.tolist() == list(range(360))
    assert record.labels.tolist() == ShardSet(digits).index("val")["label"].tolist()
    assert (record.labels == record.predictions).sum() / 360 == evaluations[better]["top1"]
    assert record.losses.mean() == pytest.approx(evaluations[better]["loss"], rel=1e-5)
    assert len(record.thumbnails) == len(record.hardest) == 24
    assert all((tmp_path / "run" / name).exists() for name in ("first-batch.jpg", "hardest.jpg"))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_return_and_a_branch_equal_the_run_bit_by_bit(
    train: Trainer, tmp_path: Path, digits: Path, ranks: int
) -> None:
    """With mixed images and drop path, from the middle of an epoch.

    Of two ranks, every save averages BatchNorm's statistics, so the steps of saves must be the same.
    """
    mixed = ("--augment", "fat", "--drop-path", "0.1")
    options = (*FEW_STEPS, "--data", digits, *mixed, "--stop-after", "5", "--save-every", "2")

    def weights(name: str, *more: str | Path) -> dict[str, torch.Tensor]:
        done = train(*options, "--out", tmp_path / name, *more, ranks=ranks)
        assert done.returncode == 0, done.stderr
        return load_file(tmp_path / name / "weights-last.safetensors")

    whole = weights("whole")
    branched = weights("branch", "--resume", tmp_path / "whole" / "checkpoints" / "step-00000002")
    returned = weights("whole", "--resume", "step:2")
    assert [line["step"] for line in lines(tmp_path / "branch", "start")] == [2]
    assert [line["step"] for line in lines(tmp_path / "whole", "start")] == [0, 2]
    for found in (branched, returned):
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[name], whole[name]) for name in whole)

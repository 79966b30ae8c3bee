"""The commands of launch/ in one process: dry run, evaluation, fine-tuning, curves."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import fat
from launch.evaluate import main as evaluate
from launch.evaluate import show
from launch.monitor.curves import draw_curves
from launch.run.evaluation_record import read_record
from launch.train import main as train
from shards.errors import UserError
from tests.support.commands import SMALL, run, run_pipeline
from tests.support.hostile_weights import CHECKPOINTS, SAFETENSORS


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of FAT-B0 for ten classes whose classifier always ranks the classes 3, 2, 1, 0, 9 first."""
    torch.manual_seed(0)
    model = fat.create_model("fat_b0", num_classes=10)
    torch.nn.init.zeros_(model.head.weight)
    model.head.bias.data = torch.arange(10.0).roll(4)
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    fat.save_weights(model, path)
    return path


def test_dry_run_describes_the_run_and_writes_nothing(
    tmp_path: Path, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run(train, *SMALL, "--data", digits, "--out", out, "--dry-run") == 0
    shown = capsys.readouterr().out
    for fact in ("44 = 1 epochs x 44", "1,437 images, 10 classes", "4,240,058", "29 images per epoch", "49 MiB"):
        assert fact in shown
    assert not out.exists()


def test_dry_run_shows_the_memory_cache(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = ("--memory-cache", "0.01", "--memory-cache-short-side", "48")
    assert run(train, *SMALL, "--data", digits, *cache, "--dry-run") == 0
    assert "0.00925 GiB per node: 1,437 of 1,437 images (100.0%), short side at most 48" in capsys.readouterr().out


@pytest.mark.parametrize("how", [(), ("--dry-run",)])
def test_invalid_combination_is_rejected_before_the_run_folder_is_created(
    tmp_path: Path, digits: Path, capsys: pytest.CaptureFixture[str], how: tuple[str, ...]
) -> None:
    impossible = ("--zero", "1", "--memory-format", "channels-last")
    assert run(train, *SMALL, *impossible, *how, "--data", digits, "--out", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert "error: --memory-format channels-last: DeepSpeed (ZeRO stage 1) supports only contiguous weights" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_storage_failure_ends_with_status_1(
    tmp_path: Path, digits: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    out, real = tmp_path / "run", os.open

    def fails(path: Any, *args: Any, **kwargs: Any) -> int:
        if os.fspath(path) == os.fspath(out / ".lock"):
            raise OSError(number, os.strerror(number), os.fspath(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", fails)
    assert run(train, *SMALL, "--data", digits, "--out", out) == 1
    error = capsys.readouterr().err
    assert f"error: {out}: the run folder cannot be written (.lock: {os.strerror(number)}); " in error
    assert "--out" in error


@pytest.mark.parametrize("fused", [False, True])
def test_evaluation_counts_every_image_once_and_by_class(
    tmp_path: Path, digits: Path, weights: Path, fused: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "figures.json"
    predictions = tmp_path / "predictions.safetensors"
    options = ("--size", "32", "--batch", "100", "--json", out, "--predictions", predictions)
    assert run(evaluate, weights, "--data", digits, *options, *(["--fuse"] if fused else [])) == 0
    result = json.loads(out.read_text())
    classes = result["classes"]
    assert result["samples"] == sum(entry["samples"] for entry in classes.values()) == 360
    assert {name: entry["top1"] for name, entry in classes.items()} == {n: float(n == "3_three") for n in classes}
    assert result["top1"] == pytest.approx(classes["3_three"]["samples"] / 360)
    assert result["top5"] == pytest.approx(
        sum(classes[n]["samples"] for n in ("3_three", "2_two", "1_one", "0_zero", "9_nine")) / 360
    )
    record = read_record(predictions)
    assert record.ids.tolist() == list(range(360))
    assert (record.labels == record.predictions).mean() == pytest.approx(result["top1"])
    assert record.losses.mean() == pytest.approx(result["loss"], rel=1e-5)
    pairs = [(pair["label"], pair["prediction"], pair["count"]) for pair in result["confusions"]]
    assert sorted(pairs) == sorted((n, "3_three", entry["samples"]) for n, entry in classes.items() if n != "3_three")
    shown = capsys.readouterr().out
    assert "over 360 images" in shown
    assert "hardest classes" in shown
    assert "most frequent confusions" in shown


def test_table_of_hardest_classes_has_no_class_without_errors(capsys: pytest.CaptureFixture[str]) -> None:
    classes = {"ant": {"name": None, "top1": 1.0, "samples": 2}, "bee": {"name": None, "top1": 0.5, "samples": 2}}
    pairs = [{"label": "bee", "prediction": "ant", "count": 1}]
    show({"top1": 0.75, "top5": 1.0, "loss": 1.0, "samples": 4, "classes": classes, "confusions": pairs})
    shown = capsys.readouterr().out
    assert "ant" not in shown.partition("confusions")[0]
    assert "bee" in shown.partition("confusions")[0]
    assert "top-5" not in shown  # always 100 % with 2 classes
    all_right = {"ant": classes["ant"]}
    show({"top1": 1.0, "top5": 1.0, "loss": 1.0, "samples": 2, "classes": all_right, "confusions": []})
    assert capsys.readouterr().out.count("\n") == 1


def test_evaluation_of_a_set_without_a_validation_split_suggests_the_training_split(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        (tmp_path / "images" / "train" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / "train" / name / "x.png")
    run_pipeline("shard", tmp_path / "images", "--out", tmp_path / "set")
    capsys.readouterr()
    assert run(evaluate, weights, "--data", tmp_path / "set") == 2
    assert "no split 'val' (it has: train); use --split train" in capsys.readouterr().err


def test_evaluation_of_the_first_images(tmp_path: Path, digits: Path, weights: Path) -> None:
    out = tmp_path / "figures.json"
    assert run(evaluate, weights, "--data", digits, "--size", "32", "--limit", "50", "--json", out) == 0
    assert json.loads(out.read_text())["samples"] == 50


@pytest.mark.parametrize("what", ["nothing", "empty"])
def test_evaluation_of_a_missing_or_empty_path_is_rejected(
    tmp_path: Path, digits: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert run(evaluate, tmp_path / what, "--data", digits) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("name", ["stride 0 of 3 billion elements", "names other than strings", "header of 2^63 bytes"])
def test_evaluation_rejects_a_malicious_weights_file_in_one_line(
    tmp_path: Path, digits: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    path = tmp_path / ("w.pth" if name in CHECKPOINTS else "w.safetensors")
    (CHECKPOINTS | SAFETENSORS)[name](path)
    assert run(evaluate, path, "--data", digits) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert str(path) in line


def test_fine_tuning_uses_the_weights_and_a_new_head_for_other_classes(
    tmp_path: Path, digits: Path, weights: Path
) -> None:
    options = (*SMALL, "--data", digits, "--weights", weights, "--stop-after", "1", "--lr", "0", "--min-lr", "0")
    given = load_file(weights)
    for classes, out in ((10, tmp_path / "same"), (12, tmp_path / "other")):
        assert run(train, *options, "--classes", classes, "--out", out, "--warmup-lr", "0") == 0
        tuned = load_file(out / "weights-last.safetensors")
        kept = [name for name in given if "running" not in name and "batches" not in name and "head" not in name]
        assert all(torch.equal(given[name], tuned[name]) for name in kept)
        assert tuned["head.weight"].shape[0] == classes
        head = [name for name in given if name.startswith("head.")]
        assert [torch.equal(given[name], tuned[name][:10]) for name in head] == [classes == 10] * len(head)


def test_weights_of_another_variant_are_rejected(
    tmp_path: Path, digits: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(train, *SMALL, "--variant", "b1", "--data", digits, "--weights", weights, "--out", tmp_path / "r") == 2
    assert "w.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_curves_require_metrics(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"contains no metrics\.jsonl"):
        draw_curves(tmp_path)


def test_metrics_are_logged_to_tensorboard(tmp_path: Path, digits: Path) -> None:
    out = tmp_path / "run"
    options = ("--data", digits, "--out", out, "--stop-after", "2", "--log-every", "1", "--tracker", "tensorboard")
    assert run(train, *SMALL, *options) == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next(out.rglob("events.out.tfevents.*")).parent))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]

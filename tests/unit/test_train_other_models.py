"""Training of other models than FAT: the same data, resuming, fine-tuning, measurements."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from launch.engine.engine import Engine
from launch.evaluate import main as evaluate
from launch.train import main as train
from tests.support.commands import SMALL, run, run_pipeline
from tests.support.launching import lines
from tests.support.vision_libraries import vision_libraries  # noqa: F401 - a fixture

HERE = "tests.support.models"
Steps = list[tuple[list[int], torch.Tensor]]


@pytest.fixture
def trained(digits: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Steps]:
    """Function that runs launch/train.py on digits, and returns the ids and pixels of each step."""
    seen: Steps = []
    original = Engine.step

    def step(engine: Engine, batches: Any, **options: Any) -> Any:
        ids = np.concatenate([batch.ids for batch in batches]).tolist()
        seen.append((ids, torch.cat([batch.images for batch in batches]).clone()))
        return original(engine, batches, **options)

    monkeypatch.setattr(Engine, "step", step)
    monkeypatch.setattr("launch.train.draw_curves", lambda run: run)  # it takes longer than the training

    def start(out: Path, *options: object) -> Steps:
        seen.clear()
        assert run(train, *SMALL, "--data", digits, "--out", out, *options) == 0
        return [*seen]

    return start


def state(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:08d}" / "state.safetensors")


@pytest.mark.usefixtures("vision_libraries")
def test_a_resnet18_and_a_fat_b0_train_on_the_same_ids_and_pixels(
    tmp_path: Path, trained: Callable[..., Steps], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--recipe", "digits", "--size", "32", "--stop-after", "2", "--mixup", "0.2")
    resnet = trained(tmp_path / "resnet", *options, "--model", "timm/resnet18")
    assert "training timm/resnet18 on 1 x cpu" in capsys.readouterr().err
    ours = trained(tmp_path / "fat", *options)
    assert len(ours) == len(resnet) == 2
    for (ids, images), (other_ids, other_images) in zip(ours, resnet, strict=True):
        assert ids == other_ids
        assert torch.equal(images, other_images)
    assert [line["model"] for name in ("resnet", "fat") for line in lines(tmp_path / name, "start")] == [
        "timm/resnet18",
        "fat_b0",
    ]
    assert state(tmp_path / "resnet", 2)["model/fc.weight"].shape == (10, 512)


@pytest.mark.parametrize("name", ["timm/test_resnet", f"{HERE}:with_classifier"])
def test_a_resumed_run_is_bit_identical(
    tmp_path: Path,
    trained: Callable[..., Steps],
    name: str,
    vision_libraries: None,  # noqa: F811
) -> None:
    options = ("--model", name, "--save-every", "2", "--drop-path", "0", "--ema", "0.9")
    trained(tmp_path / "whole", *options, "--stop-after", "4")
    trained(tmp_path / "parts", *options, "--stop-after", "2")
    trained(tmp_path / "parts", *options, "--stop-after", "4")
    whole, parts = state(tmp_path / "whole", 4), state(tmp_path / "parts", 4)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert any(not torch.equal(whole[key], value) for key, value in state(tmp_path / "whole", 2).items())
    assert not any("mask" in key for key in whole)  # a buffer that is not in the model's state_dict


@pytest.mark.usefixtures("vision_libraries")
@pytest.mark.parametrize("name", ["timm/test_resnet", f"{HERE}:with_classifier"])
def test_a_run_is_evaluated_and_exported(
    tmp_path: Path, digits: Path, trained: Callable[..., Steps], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a run, as a checkpoint and as an exported file; a function only if the user names it."""
    out, exported, figures = tmp_path / "run", tmp_path / "exported.safetensors", tmp_path / "figures.json"
    trained(out, "--model", name, "--stop-after", "2")
    top1 = lines(out, "eval")[-1]["top1"]
    named = ("--model", name) if ":" in name else ()
    run_pipeline("export", out, "--to", "safetensors", "--out", exported, *named)
    for path in (out, out / "weights-best.safetensors", exported):
        assert run(evaluate, path, "--data", digits, "--json", figures, *named) == 0
        assert json.loads(figures.read_text())["top1"] == pytest.approx(top1)
    capsys.readouterr()
    assert run(evaluate, out, "--data", digits, "--fuse", *named) == 2
    assert f"--fuse: folds BatchNorm of a FAT, but the model is {name}" in capsys.readouterr().err
    if named:
        for path in (out, exported):
            assert run(evaluate, path, "--data", digits) == 2
            assert f"if you trust this code, add --model {name}" in capsys.readouterr().err


def test_another_model_cannot_resume_the_run(
    tmp_path: Path, digits: Path, trained: Callable[..., Steps], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--stop-after", "1", "--out", tmp_path, "--data", digits)
    trained(tmp_path, "--model", f"{HERE}:small", "--stop-after", "1")
    capsys.readouterr()
    assert run(train, *SMALL, *options, "--model", f"{HERE}:with_classifier") == 2
    assert f"model was {HERE}:small, now {HERE}:with_classifier" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [("--model", f"{HERE}:feature_map"), ("--variant", "b1", "--model", f"{HERE}:small")]
)
def test_a_model_that_cannot_be_trained_is_refused_before_anything_is_written(
    tmp_path: Path, digits: Path, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(train, *SMALL, *options, "--data", digits, "--out", tmp_path / "run") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert f"--model {HERE}:" in line
    assert not (tmp_path / "run").exists()


def test_frozen_batchnorm_keeps_its_statistics(tmp_path: Path, trained: Callable[..., Steps]) -> None:
    trained(tmp_path, "--model", f"{HERE}:small", "--stop-after", "1", "--freeze-bn")
    after = state(tmp_path, 1)
    assert after["model/1.running_mean"].tolist() == [0.0] * 8
    assert after["model/1.running_var"].tolist() == [1.0] * 8


def test_dry_run_describes_another_model(tmp_path: Path, digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--model", f"{HERE}:small", "--data", digits, "--out", tmp_path / "run", "--dry-run")
    assert run(train, *SMALL, *options, "--kernels", "auto") == 0
    shown = capsys.readouterr().out
    for fact in (f"dry run of {HERE}:small", "322", "0.000 G per image", "kernels off"):
        assert fact in shown
    assert not (tmp_path / "run").exists()


def test_bench_measures_another_model(tmp_path: Path, digits: Path) -> None:
    out = tmp_path / "bench.json"
    training = ("--model", f"{HERE}:small", "--size", "32", "--global-batch", "16", "--augment", "light")
    run_pipeline("bench", digits, "--steps", "1", "--json", out, "--chart", tmp_path / "b.png", "--", *training)
    assert json.loads(out.read_text())["settings"]["model"] == f"{HERE}:small"


@pytest.mark.slow
def test_tune_does_not_try_kernels_for_another_model(tmp_path: Path, digits: Path) -> None:
    training = ("--model", f"{HERE}:small", "--size", "32", "--global-batch", "16", "--augment", "light")
    out = tmp_path / "tuned.toml"
    run_pipeline("tune", digits, "--what", "model", "--seconds", "1", "--out", out, "--", *training)
    text = out.read_text()
    assert f"{HERE}:small, 16 images" in text
    assert "memory_format" in text
    assert "kernels" not in text.replace("check", "")

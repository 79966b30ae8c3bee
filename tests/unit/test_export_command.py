"""`pipeline export`: files that compute what the model computes, and that describe themselves."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

import fat
from launch.cli import main as pipeline
from launch.deploy import export
from launch.deploy.export import SUFFIXES, export_file, export_metadata
from shards.progress import Phases
from tests.support import models
from tests.support.commands import SMALL, run
from tests.support.deployed import INFO, write_weights

NAMES = ["crane (0)", "crane (1)", "10", "tench"]


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    write_weights(tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def exported(weights: Path, out: Path, *options: str) -> int:
    return pipeline(["export", str(weights), "--out", str(out), *options])


def check_metadata(found: dict[str, str]) -> None:
    assert json.loads(found["classes"]) == NAMES
    assert json.loads(found["preprocessing"]) == {
        "size": 64,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.3, 0.25],
        "channels": "RGB",
    }
    assert fat.WeightsInfo.from_header(Path("x"), found).classes == INFO.classes


def test_safetensors_file_holds_the_weights_and_describes_them(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, before = tmp_path / "a.safetensors", os.umask(0o027)
    try:
        assert exported(weights, out, "--to", "safetensors") == 0
    finally:
        os.umask(before)
    assert f"wrote {out}" in capsys.readouterr().err
    assert out.stat().st_mode & 0o777 == 0o640
    with safe_open(out, framework="pt") as file:
        check_metadata(file.metadata())
    model, original = fat.load(out).model, fat.load(weights).model
    assert all(torch.equal(t, original.state_dict()[name]) for name, t in model.state_dict().items())
    assert fat.load(out).transform == fat.load(weights).transform
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "weights.safetensors"]


def test_a_file_of_another_program_names_its_model_after_the_export(tmp_path: Path) -> None:
    name, network, out = "tests.support.models:with_classifier", models.with_classifier(4), tmp_path / "a.safetensors"
    torch.save(network.state_dict(), tmp_path / "downloaded.pth")
    assert exported(tmp_path / "downloaded.pth", out, "--to", "safetensors", "--model", name) == 0
    assert fat.read_info(out).model == name
    with safe_open(out, framework="pt") as file:
        assert torch.equal(file.get_tensor("fc.weight"), network.fc.weight)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_torch_export_file_accepts_any_batch_and_describes_itself(weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.pt2"
    assert exported(weights, out, "--to", "torch-export", "--fuse") == 0
    files = {"metadata.json": ""}
    program = torch.export.load(out, extra_files=files).module()
    check_metadata(json.loads(files["metadata.json"]))
    images = torch.randn(5, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(program(images), fat.load(weights).model(images), atol=1e-4, rtol=1e-4)


def test_model_that_is_no_fat_is_exported_at_its_image_size(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Flatten(), nn.Linear(4 * 31 * 31, 4)).eval()
    with Phases("export") as progress:
        export_file(model, INFO, tmp_path / "a.pt2", "torch-export", fuse=False, progress=progress)
    files = {"metadata.json": ""}
    program = torch.export.load(tmp_path / "a.pt2", extra_files=files).module()
    check_metadata(json.loads(files["metadata.json"]))
    images = torch.randn(3, 3, 64, 64)
    torch.testing.assert_close(program(images), model(images))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fat_of_the_smallest_size_is_exported_at_this_size(tmp_path: Path) -> None:
    model = write_weights(tmp_path / "w.safetensors", info=dataclasses.replace(INFO, size=32))
    assert exported(tmp_path / "w.safetensors", tmp_path / "a.pt2", "--to", "torch-export") == 0
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        found = torch.export.load(tmp_path / "a.pt2").module()(images)
        torch.testing.assert_close(found, model(images), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("content", "is_replaced"), [(b"other", False), (b"", False), (None, True)], ids=["other", "empty", "export"]
)
def test_only_an_earlier_export_is_replaced(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, is_replaced: bool
) -> None:
    out = tmp_path / "a.safetensors"
    if content is None:
        assert exported(weights, out, "--to", "safetensors") == 0
    else:
        out.write_bytes(content)
    assert exported(weights, out, "--to", "safetensors") == (0 if is_replaced else 2)
    assert is_replaced or "specify another file" in capsys.readouterr().err
    assert is_replaced or out.read_bytes() == content


def test_the_source_is_never_replaced(weights: Path, tmp_path: Path) -> None:
    """Not even if it is an export itself, or has another name."""
    out = tmp_path / "a.safetensors"
    assert exported(weights, out, "--to", "safetensors") == 0
    before = out.read_bytes()
    (tmp_path / "link.safetensors").symlink_to(out)
    assert exported(out, tmp_path / "link.safetensors", "--to", "safetensors") == 2
    assert exported(out, out, "--to", "safetensors") == 2
    assert exported(weights, weights, "--to", "safetensors") == 2
    assert out.read_bytes() == before


def test_a_file_that_computes_other_logits_is_not_written(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = export.write_weights
    monkeypatch.setattr(
        export,
        "write_weights",
        lambda file, state, *rest: write(file, state | {"head.bias": state["head.bias"] + 0.01}, *rest),
    )
    assert exported(weights, tmp_path / "a.safetensors", "--to", "safetensors") == 2
    assert "not written, because the exported model computes other logits" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["weights.safetensors"]


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (("--to", "onnx", "--out", "a.pt2"), "expected a file name that ends in .onnx"),
        (("--to", "onnx", "--out", "no/a.onnx"), "there is no folder no"),
        (("--to", "onnx", "--ema"), "--ema requires a run folder"),
    ],
)
def test_invalid_options_are_refused(
    weights: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], fault: str
) -> None:
    assert pipeline(["export", str(weights), *options]) == 2
    assert fault in capsys.readouterr().err


def test_a_missing_package_is_named_with_its_extra(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else True)
    assert exported(weights, tmp_path / "a.onnx") == 2
    assert "--to onnx needs onnxscript; install it with: pip install 'fat-pipeline[onnx]'" in capsys.readouterr().err


def test_metadata_names_every_output() -> None:
    found = export_metadata(INFO, fat.ImageTransform.of(INFO), outputs=6)
    assert json.loads(found["classes"]) == [*NAMES, "output 4", "output 5"]


@pytest.mark.slow
@pytest.mark.timeout(1800)  # exporting FAT-B0 takes minutes on two cores
def test_every_format_has_the_same_top1_on_digits_as_the_trained_weights(digits: Path, tmp_path: Path) -> None:
    import onnxruntime
    from PIL import Image

    from launch.train import main as train

    run_folder = tmp_path / "run"
    assert run(train, "--data", digits, "--out", run_folder, *SMALL) == 0
    files = {to: tmp_path / f"a{suffix}" for to, suffix in SUFFIXES.items()}
    for to, out in files.items():
        assert exported(run_folder, out, "--to", to) == 0
    session = onnxruntime.InferenceSession(files["onnx"])
    properties = session.get_modelmeta().custom_metadata_map
    classes = json.loads(properties["classes"])
    assert classes[3] == "3_three"
    model, transform, names = fat.load(files["safetensors"])
    assert names == tuple(classes)
    images = sorted((digits.parent / "images/val").glob("*/*"))
    batch = torch.stack([transform(Image.open(path)) for path in images])
    with torch.no_grad():
        expected = model(batch).argmax(1).numpy()
        program = torch.export.load(files["torch-export"]).module()
        assert np.array_equal(program(batch).argmax(1).numpy(), expected)
    (logits,) = session.run(None, {"images": batch.numpy()})
    assert np.array_equal(logits.argmax(1), expected)
    accuracy = np.mean([path.parent.name == classes[best] for path, best in zip(images, expected, strict=True)])
    assert accuracy > 0.2  # chance: 0.1

"""`pipeline predict` classifies images as an evaluation of their shard set does, and passes over other files."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import fat
from launch.cli import main as pipeline
from launch.deploy.images import ImageSource, find_images
from launch.evaluate import main as evaluate
from shards.errors import UserError
from shards.format.dataset import ShardSet
from shards.images.accept import accept
from shards.images.rules import ImageRules
from tests.support.commands import run, run_pipeline
from tests.support.deployed import CLASSES, INFO, write_images, write_weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with images/ and weights.safetensors."""
    folder = tmp_path_factory.mktemp("predict")
    write_images(folder / "images")
    write_weights(folder / "weights.safetensors", folder / "images")
    return folder


def predict(*arguments: str | Path) -> tuple[int, list[dict]]:
    """Run `pipeline predict ... --json FILE`; return its status and the parsed lines."""
    out = Path(arguments[0]).parent / "out.jsonl"
    status = pipeline(["predict", *map(str, arguments), "--json", str(out)])
    return status, [json.loads(line) for line in out.read_text().splitlines()]


def test_every_prediction_and_the_accuracy_are_those_of_the_evaluation(folder: Path) -> None:
    images, weights = folder / "images", folder / "weights.safetensors"
    run_pipeline("shard", images, "--out", folder / "set", "--workers", "1")
    files = ("--json", folder / "e.json", "--predictions", folder / "e.safetensors")
    assert run(evaluate, weights, "--data", folder / "set", *files, "--batch", "7") == 0
    status, found = predict(weights, images / "val", "--batch", "3", "--threads", "2")
    assert (status, len(found)) == (0, 20)
    right = sum(line["classes"][0]["folder"] == Path(line["path"]).parent.name for line in found)
    evaluated = json.loads((folder / "e.json").read_text())
    assert right / len(found) == evaluated["top1"]
    assert 0.3 < evaluated["top1"] < 1  # otherwise, equal accuracies would mean little

    stored = stored_images(folder / "set", "val")
    with safe_open(folder / "e.safetensors", framework="pt") as file:
        by_sample = dict(zip(file.get_tensor("ids").tolist(), file.get_tensor("predictions").tolist(), strict=True))
    order = [CLASSES.index(entry.folder) for entry in ShardSet(folder / "set").manifest.classes]
    for line in found:
        sample = stored.index(accept(Path(line["path"]).read_bytes(), ImageRules()).data)
        assert line["classes"][0]["output"] == order[by_sample[sample]], line["path"]


def stored_images(dataset: Path, split: str) -> list[bytes]:
    import tarfile

    found = []
    for tar in sorted(dataset.glob(f"{split}*.tar")):
        with tarfile.open(tar) as opened:
            found += [opened.extractfile(m).read() for m in opened if m.name.endswith(".jpg")]  # type: ignore[union-attr]
    return found


def test_five_lines_of_python_predict_the_same(folder: Path) -> None:
    path = folder / "images/val/1/0.jpg"
    model, transform, classes = fat.load(folder / "weights.safetensors")
    with torch.inference_mode():
        probabilities = model(transform(Image.open(path))[None]).softmax(1)[0]
    _, (line,) = predict(folder / "weights.safetensors", path)
    best = line["classes"][0]
    assert best["output"] == probabilities.argmax()
    assert best["probability"] == pytest.approx(float(probabilities.max()), rel=1e-4)
    assert line["classes"] == sorted(line["classes"], key=lambda each: -each["probability"])
    assert {each["folder"]: each["name"] for each in line["classes"]} == dict(
        zip(CLASSES, ("crane", "crane", None, "tench"), strict=True)
    )
    assert classes == ("crane (0)", "crane (1)", "10", "tench")


def test_text_has_one_line_per_image_with_the_most_probable_classes(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pipeline(["predict", str(folder / "weights.safetensors"), str(folder / "images/val/2"), "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert all(line.count("%") == 2 and line.startswith(str(folder / "images/val/2")) for line in lines)
    assert any("tench" in line for line in lines)


def test_other_files_are_skipped_with_the_reason_and_status_1(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = (folder / "images/val/0/0.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(good)
    (tmp_path / "cut.jpg").write_bytes(good[:3000])
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "z.jpg").write_bytes(good)
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "no suffix").write_bytes(good)
    weights = folder / "weights.safetensors"
    assert pipeline(["predict", str(weights), str(tmp_path), str(tmp_path / "a.jpg"), "--json", "-"]) == 1
    out, err = capsys.readouterr()
    assert [Path(json.loads(line)["path"]).name for line in out.splitlines()] == [
        "a.jpg",
        "no suffix",
        "z.jpg",
        "a.jpg",
    ]
    for name, reason in (("cut.jpg", "does not decode"), ("empty.png", "empty file"), ("text.jpg", "not an image")):
        assert f"{name}: skipped: " in err
        assert reason in err
    assert "3 of 7 images skipped" in err
    assert "files that are not images: 1" in err


def test_images_are_found_by_files_folders_patterns_and_standard_input(folder: Path) -> None:
    val = folder / "images/val"
    empty = io.BytesIO()

    def names(*arguments: object, stdin: bytes = b"") -> list[str]:
        found, _ = find_images([str(each) for each in arguments], io.BytesIO(stdin))
        return [source.name for source in found]

    assert len(names(val)) == 20
    assert names(val / "1/3.gif", val / "0/0.jpg") == [str(val / "1/3.gif"), str(val / "0/0.jpg")]
    assert names(f"{val}/*/0.jpg") == [str(val / name / "0.jpg") for name in sorted(CLASSES)]
    assert len(names(f"{val}/**/*.png")) == 4
    assert names("-", stdin=b"a b.jpg\nc.jpg\n") == ["a b.jpg", "c.jpg"]
    assert names("-", stdin=b"a\nb.jpg\0\xff.jpg\0") == ["a\nb.jpg", "\udcff.jpg"]
    encoded = (val / "0/0.jpg").read_bytes()
    assert find_images(["-"], io.BytesIO(encoded))[0] == [ImageSource("-", encoded)]
    odd = folder / "a [1].jpg"
    odd.write_bytes(encoded)
    assert names(odd) == [str(odd)]
    for wrong, fault in (
        ("nothing", "no such file or folder"),
        (f"{val}/*.bmp", "no file matches this pattern"),
        ("x" * 5000, "specify"),
    ):
        with pytest.raises(UserError, match=fault):
            find_images([wrong], empty)
    with pytest.raises(UserError, match="no images found"):
        find_images(["-"], empty)


def test_names_on_standard_input_that_do_not_exist_are_skipped(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image = folder / "images/val/0/0.jpg"
    names = f"{image}\n/nowhere.jpg\n{folder}\n".encode()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(names)))
    status, found = predict(folder / "weights.safetensors", "-")
    assert (status, [line["path"] for line in found]) == (1, [str(image)])
    err = capsys.readouterr().err
    assert "/nowhere.jpg: skipped: No such file or directory" in err
    assert f"{folder}: skipped: {folder}: a folder, not a regular file" in err


def test_orientation_is_applied_only_on_request(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored rotated by a quarter turn
    with Image.open(folder / "images/val/1/0.jpg") as upright:
        upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "phone.jpg", exif=exif, quality=100, subsampling=0)
        upright.save(tmp_path / "upright.jpg", quality=100, subsampling=0)
    weights = tmp_path / "weights.safetensors"
    write_weights(weights)

    def scores(name: str, *options: str) -> torch.Tensor:
        _, (line,) = predict(weights, tmp_path / name, *options)
        outputs = sorted(line["classes"], key=lambda each: each["output"])
        return torch.tensor([each["probability"] for each in outputs])

    stored = scores("phone.jpg")
    assert "1 of 1 images have an EXIF orientation" in capsys.readouterr().err
    rotated, expected = scores("phone.jpg", "--apply-orientation"), scores("upright.jpg")
    assert "EXIF" not in capsys.readouterr().err
    assert (rotated - expected).abs().max() < 0.1 * (stored - expected).abs().max()


def test_best_weights_of_a_run_are_used_and_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def used(*options: str) -> str:
        status = pipeline(["predict", str(tmp_path), str(folder / "images/val/0/0.jpg"), *options])
        err = capsys.readouterr().err
        return err if status else Path(err.partition(", step 7: size 64, crop 0.875")[0]).name

    assert "contains no weights file" in used()
    assert "contains no weights-ema-last.safetensors; omit --ema" in used("--ema")
    for name, top1, best, best_average in (
        ("weights-last.safetensors", None, "weights-last.safetensors", None),
        ("weights-ema-last.safetensors", None, "weights-last.safetensors", "weights-ema-last.safetensors"),
        ("weights-best.safetensors", 0.7, "weights-best.safetensors", "weights-ema-last.safetensors"),
        ("weights-ema-best.safetensors", 0.6, "weights-best.safetensors", "weights-ema-best.safetensors"),
        ("weights-ema-best.safetensors", 0.8, "weights-ema-best.safetensors", "weights-ema-best.safetensors"),
    ):
        write_weights(tmp_path / name, info=dataclasses.replace(INFO, top1=top1))
        assert used() == best
        assert best_average is None or used("--ema") == best_average


def test_class_names_that_are_too_long_for_the_header_come_from_the_run_folder(folder: Path, tmp_path: Path) -> None:
    assert INFO.classes is not None
    digest_only = dataclasses.replace(INFO, classes=fat.ClassList(count=4, digest=INFO.classes.digest))
    write_weights(tmp_path / "w.safetensors", info=digest_only)
    _, (line,) = predict(tmp_path / "w.safetensors", folder / "images/val/0/0.jpg")
    assert {each["folder"] for each in line["classes"]} == {None}
    (tmp_path / "classes.json").write_text(INFO.classes.dumps())
    _, (line,) = predict(tmp_path / "w.safetensors", folder / "images/val/0/0.jpg")
    assert {each["folder"] for each in line["classes"]} == set(CLASSES)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (("--device", "tpu7"), "--device tpu7: "),
        (("--device", "cuda:99"), "--device cuda:99: there is no such device"),
        (("--size", "31"), "--size 31: expected a whole number from 32"),
        (("--json", "/no/such.jsonl"), "there is no folder /no"),
        (("--ema",), "--ema requires a run folder"),
    ],
)
def test_invalid_options_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], fault: str
) -> None:
    image = str(folder / "images/val/0/0.jpg")
    assert pipeline(["predict", str(folder / "weights.safetensors"), image, *options]) == 2
    assert fault in capsys.readouterr().err


def test_weights_that_cannot_be_used_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, path = str(folder / "images/val/0/0.jpg"), tmp_path / "w.safetensors"
    for info, fault in (
        (fat.WeightsInfo(model="nets:tiny"), "its model is created by the function nets:tiny"),
        (fat.WeightsInfo(), "contains no config"),
    ):
        save_file({"fc.weight": torch.zeros(2, 3)}, path, info.to_header())
        assert pipeline(["predict", str(path), image]) == 2
        assert f"error: {path}: {fault}" in capsys.readouterr().err

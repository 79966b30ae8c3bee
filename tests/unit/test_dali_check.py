"""benchmarks/dali_check.py on DALI's CPU backend: every operator is checked, even if another check fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from nvidia.dali import fn

from benchmarks import dali_check
from tests.support.commands import run_pipeline

CHECKS = [
    "decode a window",
    "decode whole images",
    "resize",
    "resize, flip",
    "resize, flip, normalize",
    "evaluation: resize, crop",
    "images/s",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("photos") / "photos"
    run_pipeline("sample", "photos", made, "--count", "26")
    return made


def run(patch: pytest.MonkeyPatch, *options: str | Path) -> int:
    patch.setattr(sys, "argv", ["dali_check.py", *map(str, options)])
    return dali_check.main()


def test_every_operator_runs_on_the_cpu(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "rows.json"
    assert run(monkeypatch, folder, "--device", "cpu", "--batch", "4", "--out", out) == 0
    rows = {row["check"]: row["found"] for row in json.loads(out.read_text())["results"]}
    assert list(rows) == CHECKS
    assert rows["decode a window"].startswith("4 images, (64, 64, 3), torch.uint8 on cpu")
    assert rows["resize, flip"].startswith("4 images, (224, 224, 3), torch.uint8")
    assert rows["resize, flip, normalize"].startswith("4 images, (224, 224, 3), torch.float32")
    assert rows["evaluation: resize, crop"].startswith("4 images, (64, 64, 3), torch.uint8")


def test_a_failing_check_is_reported_and_the_others_still_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(fn, "flip", broken)
    out = tmp_path / "rows.json"
    assert run(monkeypatch, folder, "--device", "cpu", "--batch", "2", "--out", out) == 1
    rows = json.loads(out.read_text())["results"]
    assert [row["check"] for row in rows] == CHECKS
    failed = {row["check"] for row in rows if row["failed"]}
    assert failed == {"resize, flip", "images/s"}  # the throughput is measured with resize and flip
    assert all("no kernel image is available" in row["found"] for row in rows if row["failed"])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_invalid_input_is_reported(
    folder: Path, tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dali_check.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, folder if device == "cuda" else tmp_path, "--device", device)
    assert ended.value.code == 2
    expected = "no CUDA device" if device == "cuda" else "create the folder with: pipeline sample photos"
    assert expected in capsys.readouterr().err

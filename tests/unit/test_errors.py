"""Invalid input gives a one-line error and exit status 2."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from launch.cli import main as pipeline
from launch.config.command_line import parse
from launch.feed import Feed
from launch.machine.world import World
from launch.train import main as train
from shards.errors import UserError
from tests.support.commands import SMALL, run


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the last line of standard error, which must be its only error; the others have the time."""
    shown = capsys.readouterr().err.strip()
    assert "Traceback" not in shown
    *phases, shown = shown.splitlines()
    assert not [line for line in phases if not re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [a-z]", line)], phases
    assert shown.startswith("error: ")
    return shown


@pytest.fixture
def copied(digits: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(digits, tmp_path / "set"))


def test_a_missing_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pipeline(["shard", str(tmp_path / "none")]) == 2
    assert "none" in error_line(capsys)


def test_an_empty_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "imagenet").mkdir()
    assert pipeline(["shard", str(tmp_path / "imagenet")]) == 2
    assert "imagenet" in error_line(capsys)


def test_a_class_folder_without_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "in" / "train" / name).mkdir(parents=True)
    source = Path(__file__).parents[1] / "data" / "one.jpg"
    shutil.copy(source, tmp_path / "in" / "train" / "cat" / "one.jpg")
    assert pipeline(["shard", str(tmp_path / "in")]) == 2
    assert "dog" in error_line(capsys)


@pytest.mark.parametrize("command", [["verify"], ["info"], ["look"]])
def test_a_folder_without_a_shard_set(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pipeline([*command, str(tmp_path / "none")]) == 2
    assert "no such shard set" in error_line(capsys)


def test_a_manifest_of_another_version(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = json.loads((copied / "dataset.json").read_text())
    (copied / "dataset.json").write_text(json.dumps(manifest | {"version": 99}))
    for command in (lambda: pipeline(["info", str(copied)]), lambda: train_on(copied)):
        assert command() == 2
        line = error_line(capsys)
        assert "version 99" in line
        assert "dataset.json" in line


def test_a_truncated_tar(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = sorted(copied.glob("train-*.tar"))[1]
    os.truncate(shard, shard.stat().st_size - 1000)
    assert train_on(copied) == 2
    line = error_line(capsys)
    assert shard.name in line
    assert "truncated" in line


def test_fewer_images_than_one_batch(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_on(digits, "--global-batch", "2048") == 2
    assert "1437 training images are fewer than one global batch of 2048" in error_line(capsys)


def test_a_world_size_that_does_not_divide_the_batch(digits: Path) -> None:
    recipe = parse(["--data", str(digits), "--global-batch", "64"])
    with pytest.raises(UserError, match=r"world size 3 .* global batch of 64.*: 2 and 4"):
        Feed.of(recipe, World(0, 3, 0, 3, torch.device("cpu")))


def test_a_micro_batch_that_does_not_divide_the_batch(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_on(digits, "--micro-batch", "7") == 2
    assert "micro-batch 7 does not divide the 64 rows" in error_line(capsys)


def test_no_data_specified(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FAT_DATA", raising=False)
    assert train_with("--out", "run") == 2
    assert "--data" in error_line(capsys)


def train_on(data: Path, *args: str) -> int:
    return train_with("--data", str(data), "--out", str(data.parent / "run"), *args)


def train_with(*args: str) -> int:
    return run(train, *SMALL, "--size", "64", "--global-batch", "64", *args)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("tune SET -- --read-threads 0", "--read-threads 0: expected a whole number from 1 to 1,024"),
        ("bench SET -- --hw-decoder-load 2", "--hw-decoder-load 2: expected a number from 0 to 1"),
    ],
)
def test_invalid_options_of_pipeline_commands(command: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert pipeline(command.split()) == 2
    assert error_line(capsys) == f"error: {message}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--read-threads 0", "--read-threads 0: expected a whole number from 1 to 1,024"),
        ("--lock-wait -1", "--lock-wait -1: expected a number from 0 to 100,000,000"),
        ("--lock-wait nan", "--lock-wait nan: expected a number from 0 to 100,000,000"),
        ("--lock-wait inf", "--lock-wait inf: expected a number from 0 to 100,000,000"),
        ("--hang-timeout nan", "--hang-timeout nan: expected a number from 0 to 100,000,000"),
        (
            "--lock-wait 1741",
            "--lock-wait 1741: expected at most 1740, because the other ranks wait only 30 minutes for rank 0",
        ),
        (
            "--recipe none.toml",
            "none.toml: no such recipe file (expected a file, or one of the names digits, fat_b0_30, fat_b0_300, "
            "fat_b0_88, large_batch)",
        ),
    ],
)
def test_invalid_options_of_training(
    options: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", *options.split()])
    assert train() == 2
    assert error_line(capsys) == f"error: {message}"

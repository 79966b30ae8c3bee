"""Source folders as users have them are converted as intended, or rejected with an error that names the fault."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from launch.cli import main as pipeline
from shards.format.dataset import ShardSet
from shards.redact import one_line
from tests.support.source_folders import SOURCES, Source

SUFFIXES_NOT_IN_TARS = (".json",)
"""Suffixes that are not expected in the output of `pipeline index`, which reads only the tars."""
TOLERANCE = 14
"""Tolerance of an image's mean color (of 255), for JPEG and rounding."""


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_every_source_is_converted_as_intended_or_rejected_with_a_helpful_error(
    source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = _make(source, tmp_path), tmp_path / "set"
    status, output = _convert(folder, out, *source.options, capsys=capsys)
    assert "Traceback" not in output
    if source.error is not None and status == source.status:
        assert not (out / "dataset.json").exists()
        error = output.splitlines()[-1]
        assert error.startswith("error: ")
        _check_contains(source.error, error)
        return
    assert status == 0, f"status {status}: {output}"
    made = json.loads((out / "dataset.json").read_text())
    splits = {split: entry["samples"] for split, entry in made["splits"].items()}
    assert splits in source.images, output
    if source.classes is not None:
        assert tuple(entry["folder"] for entry in made["classes"]) == source.classes
    _check_contains(source.messages, output)
    _check_contains(source.notes, _notes(output))
    unused = made["made"]["unused"]
    _check_contains([one_line(entry["kind"]) for entry in unused], output)
    if source.counts_files:
        _check_all_counted(source, folder, sum(splits.values()) + _lines(out / "rejects.jsonl"), unused)
    _check_colors(source, out, output)


@pytest.mark.parametrize(
    "source", [source for source in SOURCES if source.rejected_by_strict], ids=lambda source: source.name
)
def test_strict_rejects_sources_with_likely_mistakes(
    source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, output = _convert(_make(source, tmp_path), tmp_path / "set", "--strict", capsys=capsys)
    assert status in (1, 2), output  # 1 if the images have to be decoded to detect the mistake
    assert not (tmp_path / "set" / "dataset.json").exists()
    assert output.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    "source", [source for source in SOURCES if source.name.startswith("webdataset")], ids=lambda source: source.name
)
def test_index_gives_the_same_result_as_shard(
    source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _make(source, tmp_path)
    status = pipeline(["index", *map(str, sorted(folder.glob("*.tar*"))), "--workers", "1"])
    output = "".join(capsys.readouterr())
    if source.error is not None and status == source.status:
        _check_contains(source.error, output)
        return
    assert status == 0, output
    made = json.loads((folder / "dataset.json").read_text())
    assert {split: entry["samples"] for split, entry in made["splits"].items()} in source.images
    assert tuple(entry["folder"] for entry in made["classes"]) == source.classes
    _check_contains([word for word in source.messages if word not in SUFFIXES_NOT_IN_TARS], output)


def _make(source: Source, tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    source.make(folder)
    return folder


def _convert(source: Path, out: Path, *options: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Return the exit status, and the output with the paths of source and set replaced."""
    status = pipeline(["shard", str(source), "--out", str(out), "--workers", "1", *options])
    streams = capsys.readouterr()
    return status, (streams.out + streams.err).replace(f"{source}", "SOURCE").replace(f"{out}", "OUT")


def _notes(output: str) -> str:
    return "\n".join(line for line in output.splitlines() if line.startswith(("note:", "warning:")))


def _check_contains(words: Iterable[str], text: str) -> None:
    missing = [word for word in words if not any(one.lower() in text.lower() for one in word.split("|"))]
    assert not missing, f"{missing} not in: {text}"


def _lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def _check_all_counted(source: Source, folder: Path, images: int, unused: list[dict[str, Any]]) -> None:
    """Assert that every file is in the set, rejected, or unused, except label files and empty folders."""
    files, empty = 0, 0
    for _, folders, names in os.walk(folder, followlinks=True):
        files += len(names)
        empty += not names and not folders
    accounted = images + sum(entry["count"] for entry in unused)
    detail = f"{accounted} of {files} files: {images} images and {unused}"
    assert files - source.label_files <= accounted <= files + empty, detail


def _check_colors(source: Source, out: Path, output: str) -> None:
    if any(word and word in output.lower() for word in source.colors_unless.split("|")):
        return
    shard_set = ShardSet(out)
    for split, entry in shard_set.manifest.splits.items():
        for row in shard_set.index(split):
            name = shard_set.manifest.classes[row["label"]].folder
            if name in source.colors:
                with (out / entry.shards[row["shard"]].name).open("rb") as file:
                    file.seek(int(row["offset"]))
                    image = Image.open(io.BytesIO(file.read(int(row["size"])))).convert("RGB")
                mean = np.asarray(image).mean((0, 1))
                assert np.abs(mean - source.colors[name]).max() < TOLERANCE, f"{name}: {mean.round()}"

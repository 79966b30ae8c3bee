"""Folders as people have them become what their owners mean, or are refused by name, and the output says which."""

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

SUFFIXES_BESIDE_TARS = (".json",)
"""`pipeline index` is given the tars alone."""
TOLERANCE = 14
"""Of a picture's mean colour, of 255: JPEG, and the ways to round."""


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_a_source_becomes_what_its_owner_means_or_is_refused_by_name(
    source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = _make(source, tmp_path), tmp_path / "set"
    status, said = _shard(folder, out, *source.options, capsys=capsys)
    assert "Traceback" not in said
    if source.refused is not None and status == source.status:
        assert not (out / "dataset.json").exists()
        error = said.splitlines()[-1]
        assert error.startswith("error: ")
        _check_words(source.refused, error)
        return
    assert status == 0, f"status {status}: {said}"
    made = json.loads((out / "dataset.json").read_text())
    splits = {split: entry["samples"] for split, entry in made["splits"].items()}
    assert splits in source.images, said
    if source.classes is not None:
        assert tuple(entry["folder"] for entry in made["classes"]) == source.classes
    _check_words(source.says, said)
    _check_words(source.notes, _notes(said))
    unused = made["made"]["unused"]
    _check_words([one_line(entry["kind"]) for entry in unused], said)
    if source.files_count:
        _check_all_counted(source, folder, sum(splits.values()) + _lines(out / "rejects.jsonl"), unused)
    _check_colours(source, out, said)


@pytest.mark.parametrize("source", [source for source in SOURCES if source.doubtful], ids=lambda source: source.name)
def test_strict_refuses_what_may_well_be_a_mistake(
    source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, said = _shard(_make(source, tmp_path), tmp_path / "set", "--strict", capsys=capsys)
    assert status in (1, 2), said  # 1 where the images had to be decoded to know it
    assert not (tmp_path / "set" / "dataset.json").exists()
    assert said.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    "source", [source for source in SOURCES if source.name.startswith("webdataset")], ids=lambda source: source.name
)
def test_tars_are_indexed_as_they_are_sharded(
    source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _make(source, tmp_path)
    status = pipeline(["index", *map(str, sorted(folder.glob("*.tar*"))), "--workers", "1"])
    said = "".join(capsys.readouterr())
    if source.refused is not None and status == source.status:
        _check_words(source.refused, said)
        return
    assert status == 0, said
    made = json.loads((folder / "dataset.json").read_text())
    assert {split: entry["samples"] for split, entry in made["splits"].items()} in source.images
    assert tuple(entry["folder"] for entry in made["classes"]) == source.classes
    _check_words([word for word in source.says if word not in SUFFIXES_BESIDE_TARS], said)


def _make(source: Source, tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    source.make(folder)
    return folder


def _shard(source: Path, out: Path, *options: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Return exit status and output, in which paths begin at the source: where that lies says nothing about it."""
    status = pipeline(["shard", str(source), "--out", str(out), "--workers", "1", *options])
    streams = capsys.readouterr()
    return status, (streams.out + streams.err).replace(f"{source}", "SOURCE").replace(f"{out}", "OUT")


def _notes(said: str) -> str:
    return "\n".join(line for line in said.splitlines() if line.startswith(("note:", "doubt:")))


def _check_words(words: Iterable[str], text: str) -> None:
    missing = [word for word in words if not any(one.lower() in text.lower() for one in word.split("|"))]
    assert not missing, f"{missing} not in: {text}"


def _lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def _check_all_counted(source: Source, folder: Path, images: int, unused: list[dict[str, Any]]) -> None:
    """Each file is in the set, rejected or not used; what gives labels may be left out, and empty folders counted."""
    files, empty = 0, 0
    for _, folders, names in os.walk(folder, followlinks=True):
        files += len(names)
        empty += not names and not folders
    counted = images + sum(entry["count"] for entry in unused)
    assert files - source.lists <= counted <= files + empty, f"{counted} of {files} files: {images} images and {unused}"


def _check_colours(source: Source, out: Path, said: str) -> None:
    if any(word and word in said.lower() for word in source.unless_noted.split("|")):
        return
    shard_set = ShardSet(out)
    for split, entry in shard_set.manifest.splits.items():
        for row in shard_set.index(split):
            name = shard_set.manifest.classes[row["label"]].folder
            if name in source.colours:
                with (out / entry.shards[row["shard"]].name).open("rb") as file:
                    file.seek(int(row["offset"]))
                    image = Image.open(io.BytesIO(file.read(int(row["size"])))).convert("RGB")
                mean = np.asarray(image).mean((0, 1))
                assert np.abs(mean - source.colours[name]).max() < TOLERANCE, f"{name}: {mean.round()}"

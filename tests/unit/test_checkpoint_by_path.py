"""Checkpoints opened by the path of their folder, and what meta.json must say (launch/run/checkpoint.py)."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from launch.run import checkpoint
from launch.run.checkpoint import CheckpointError, DamagedCheckpoint, Fingerprint, open_checkpoint
from launch.run.checkpoint_folder import CheckpointFolder
from launch.run.progress import Progress
from shards.errors import StorageFailed


def saved(folder: Path, progress: Progress) -> Path:
    return CheckpointFolder(folder).save({"model/w": torch.ones(3)}, progress, Fingerprint({"seed": 1}, {"lr": 0.5}))


def test_a_checkpoint_opens_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, Progress(step=20, epoch=2))
    found = open_checkpoint(path)
    assert (found.path, found.progress.step, found.fingerprint.free) == (path, 20, {"lr": 0.5})
    assert found.load()["model/w"].tolist() == [1.0, 1.0, 1.0]
    monkeypatch.chdir(path)
    assert open_checkpoint(Path()).progress.step == 20  # the name counts, not how the path is written


@pytest.mark.parametrize("name", ["step-0000020", "step-00000020x", "last", "xstep-00000020"])
def test_a_folder_of_another_name_is_no_checkpoint(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path, Progress(step=20, epoch=2)).rename(tmp_path / name)
    with pytest.raises(DamagedCheckpoint, match=r"not a checkpoint folder; expected a name like step-00001234"):
        open_checkpoint(path)


def test_a_renamed_checkpoint_is_damaged(tmp_path: Path) -> None:
    path = saved(tmp_path, Progress(step=20, epoch=2)).rename(tmp_path / "step-00000030")
    with pytest.raises(DamagedCheckpoint, match=r"damaged \(meta.json: written for step 20\); skipped"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("progress", "fault"),
    [
        (Progress(step=20, epoch=3), "step 20 contradicts step 0 of epoch 3"),
        (Progress(step=20, epoch=1, epoch_step=21), "step 20 contradicts step 21 of epoch 1"),
        (Progress(step=20, epoch_step=19), "step 20 contradicts step 19 of epoch 0"),
        (Progress(step=20, epoch=2, is_best=True), "marked as the best without an evaluation"),
        (
            Progress(step=20, epoch=2, best=0.5, is_best=True, pending_evaluation=True),
            "marked as the best without an evaluation",
        ),
    ],
)
def test_contradictions_are_named(tmp_path: Path, progress: Progress, fault: str) -> None:
    with pytest.raises(DamagedCheckpoint, match=fault):
        open_checkpoint(saved(tmp_path, progress))


@pytest.mark.parametrize(
    "progress",
    [
        Progress(),
        Progress(step=7, epoch_step=7),
        Progress(step=20, epoch=2),
        Progress(step=25, epoch=2, epoch_step=5, best=0.5, is_best=True),
        Progress(step=25, epoch=2, epoch_step=5, pending_evaluation=True),
    ],
)
def test_progress_that_can_be_is_read_back(tmp_path: Path, progress: Progress) -> None:
    assert open_checkpoint(saved(tmp_path, progress)).progress == progress


def test_metadata_without_a_state_is_damage(tmp_path: Path) -> None:
    path = saved(tmp_path, Progress(step=20, epoch=2))
    meta = content(path) | {"files": {}}
    (path / "meta.json").write_text(checkpoint.render_meta(meta))
    with pytest.raises(DamagedCheckpoint, match=r"meta.json: no state.safetensors"):
        open_checkpoint(path)


def test_meta_json_is_indented_and_ends_with_a_line_end(tmp_path: Path) -> None:
    """People read it."""
    text = (saved(tmp_path, Progress(step=20, epoch=2)) / "meta.json").read_text()
    assert text.startswith('{\n "')
    assert text.endswith('"\n}\n')
    assert json.loads(text)["progress"] == asdict(Progress(step=20, epoch=2))


def test_the_order_of_keys_is_not_part_of_the_hash(tmp_path: Path) -> None:
    path = saved(tmp_path, Progress(step=20, epoch=2))
    meta = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps(dict(reversed(meta.items()))))
    assert open_checkpoint(path).progress.step == 20


def test_metadata_of_up_to_a_mebibyte_is_read(tmp_path: Path) -> None:
    """White space is not part of the hash, so it can fill meta.json to the limit."""
    path = saved(tmp_path, Progress(step=20, epoch=2))
    text = (path / "meta.json").read_text()
    (path / "meta.json").write_text(text.ljust(1048576))
    assert open_checkpoint(path).progress.step == 20
    (path / "meta.json").write_text(text.ljust(1048577))
    with pytest.raises(DamagedCheckpoint):
        open_checkpoint(path)


def test_a_state_that_grew_or_changed_after_it_was_checked_is_not_loaded(tmp_path: Path) -> None:
    path = saved(tmp_path, Progress(step=20, epoch=2))
    found, state = open_checkpoint(path), path / "state.safetensors"
    good = state.read_bytes()
    for bad in (good + b"\0", good[:-1], good[:-1] + bytes([good[-1] ^ 1])):
        state.write_bytes(bad)
        with pytest.raises(StorageFailed, match="has changed since it was checked; start the run again"):
            found.load()
    state.write_bytes(good)
    assert found.load()["model/w"].tolist() == [1.0, 1.0, 1.0]


def test_a_saved_state_that_is_no_state_is_named(tmp_path: Path) -> None:
    """Its hash fits: it was saved so."""
    path = saved(tmp_path, Progress(step=20, epoch=2))
    (path / "state.safetensors").write_bytes(b"no state")
    entry = {"bytes": 8, "xxh3": xxhash.xxh3_64_hexdigest(b"no state")}
    meta = content(path) | {"files": {"state.safetensors": entry}}
    (path / "meta.json").write_text(checkpoint.render_meta(meta))
    found = open_checkpoint(path)
    for read in (found.load, found.info):
        fault = r"(not a valid safetensors file|invalid header) .*; remove .*step-00000020, then start the run"
        with pytest.raises(CheckpointError, match=fault):
            read()


def content(path: Path) -> dict[str, Any]:
    meta = json.loads((path / "meta.json").read_text())
    del meta["hash"]
    return meta

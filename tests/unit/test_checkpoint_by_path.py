"""Opening checkpoints by the path of their folder, and validation of meta.json (launch/run/checkpoint.py)."""

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


def test_checkpoint_is_opened_by_the_path_of_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, Progress(step=20, epoch=2))
    found = open_checkpoint(path)
    assert (found.path, found.progress.step, found.fingerprint.free) == (path, 20, {"lr": 0.5})
    assert found.load()["model/w"].tolist() == [1.0, 1.0, 1.0]
    monkeypatch.chdir(path)
    assert open_checkpoint(Path()).progress.step == 20  # the resolved path is what counts


@pytest.mark.parametrize("name", ["step-0000020", "step-00000020x", "last", "xstep-00000020"])
def test_folder_with_another_name_is_no_checkpoint(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path, Progress(step=20, epoch=2)).rename(tmp_path / name)
    with pytest.raises(DamagedCheckpoint, match=r"not a checkpoint folder; expected a name like step-00001234"):
        open_checkpoint(path)


def test_renamed_checkpoint_is_damaged(tmp_path: Path) -> None:
    path = saved(tmp_path, Progress(step=20, epoch=2)).rename(tmp_path / "step-00000030")
    with pytest.raises(DamagedCheckpoint, match=r"damaged \(meta.json: written for step 20\)$"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("progress", "contradiction"),
    [
        (Progress(step=20, epoch=3), "step 20 contradicts step 0 of epoch 3"),
        (Progress(step=20, epoch=1, epoch_step=21), "step 20 contradicts step 21 of epoch 1"),
        (Progress(step=20, epoch_step=19), "step 20 contradicts step 19 of epoch 0"),
        (Progress(step=20, epoch=2, is_best=True), "marked as the best without an evaluation"),
        (
            Progress(step=20, epoch=2, best=0.5, is_best=True, pending_evaluation=True),
            "marked as the best without an evaluation",
        ),
        (Progress(step=20, epoch=2, top1={"weights": 0.5}, pending_evaluation=True), "its evaluation was interrupted"),
    ],
)
def test_contradictory_progress_is_damage(tmp_path: Path, progress: Progress, contradiction: str) -> None:
    with pytest.raises(DamagedCheckpoint, match=contradiction):
        open_checkpoint(saved(tmp_path, progress))


@pytest.mark.parametrize(
    "progress",
    [
        Progress(),
        Progress(step=7, epoch_step=7),
        Progress(step=20, epoch=2),
        Progress(step=25, epoch=2, epoch_step=5, best=0.5, is_best=True),
        Progress(step=25, epoch=2, epoch_step=5, pending_evaluation=True),
        Progress(step=20, epoch=2).evaluated({"weights": 0.5, "average": 0.75}).evaluated({"weights": 0.25}),
    ],
)
def test_consistent_progress_is_read_back(tmp_path: Path, progress: Progress) -> None:
    assert open_checkpoint(saved(tmp_path, progress)).progress == progress


def test_metadata_without_state_is_damage(tmp_path: Path) -> None:
    path = saved(tmp_path, Progress(step=20, epoch=2))
    meta = content(path) | {"files": {}}
    (path / "meta.json").write_text(checkpoint.render_meta(meta))
    with pytest.raises(DamagedCheckpoint, match=r"meta.json: no state.safetensors"):
        open_checkpoint(path)


def test_meta_json_is_indented_and_ends_with_a_newline(tmp_path: Path) -> None:
    """The file is meant to be readable for users."""
    text = (saved(tmp_path, Progress(step=20, epoch=2)) / "meta.json").read_text()
    assert text.startswith('{\n "')
    assert text.endswith('"\n}\n')
    assert json.loads(text)["progress"] == json.loads(json.dumps(asdict(Progress(step=20, epoch=2))))


def test_hash_does_not_depend_on_the_order_of_keys(tmp_path: Path) -> None:
    path = saved(tmp_path, Progress(step=20, epoch=2))
    meta = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps(dict(reversed(meta.items()))))
    assert open_checkpoint(path).progress.step == 20


def test_metadata_is_read_up_to_one_mebibyte(tmp_path: Path) -> None:
    """White space is not hashed, so the test fills meta.json with it up to the limit."""
    path = saved(tmp_path, Progress(step=20, epoch=2))
    text = (path / "meta.json").read_text()
    (path / "meta.json").write_text(text.ljust(1048576))
    assert open_checkpoint(path).progress.step == 20
    (path / "meta.json").write_text(text.ljust(1048577))
    with pytest.raises(DamagedCheckpoint):
        open_checkpoint(path)


def test_state_that_grew_or_changed_after_verification_is_not_loaded(tmp_path: Path) -> None:
    path = saved(tmp_path, Progress(step=20, epoch=2))
    found, state = open_checkpoint(path), path / "state.safetensors"
    good = state.read_bytes()
    for bad in (good + b"\0", good[:-1], good[:-1] + bytes([good[-1] ^ 1])):
        state.write_bytes(bad)
        with pytest.raises(StorageFailed, match="has changed since it was checked; start the run again"):
            found.load()
    state.write_bytes(good)
    assert found.load()["model/w"].tolist() == [1.0, 1.0, 1.0]


def test_invalid_state_with_valid_hash_is_reported(tmp_path: Path) -> None:
    """The hash is valid, so the file was already invalid when it was saved."""
    path = saved(tmp_path, Progress(step=20, epoch=2))
    (path / "state.safetensors").write_bytes(b"no state")
    entry = {"bytes": 8, "xxh3": xxhash.xxh3_64_hexdigest(b"no state")}
    meta = content(path) | {"files": {"state.safetensors": entry}}
    (path / "meta.json").write_text(checkpoint.render_meta(meta))
    found = open_checkpoint(path)
    for read in (found.load, found.info):
        with pytest.raises(CheckpointError, match=r"safetensors: .*; remove .*step-00000020, then start the run again"):
            read()


def content(path: Path) -> dict[str, Any]:
    meta = json.loads((path / "meta.json").read_text())
    del meta["hash"]
    return meta

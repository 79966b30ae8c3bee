"""Golden values of a checkpoint's files, and error messages for damaged ones (launch/run/checkpoint.py)."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

import fat
from launch.run import checkpoint
from launch.run.checkpoint import (
    CheckpointError,
    DamagedCheckpoint,
    Fingerprint,
    hash_file,
    open_checkpoint,
    render_meta,
)
from launch.run.checkpoint_folder import CheckpointFolder
from launch.run.progress import Progress
from shards.errors import StorageFailed, UserError

PROGRESS = Progress(
    step=25, epoch=2, epoch_step=5, best=0.25, best_of="average", is_best=True, pending_evaluation=False, seconds=1.5,
    top1={"weights": 0.125, "average": 0.25},
)  # fmt: skip
FINGERPRINT = Fingerprint(fixed={"global_batch": 64, "data": "s\u00e9t"}, free={"lr": 0.1, "note": None})
STATE = {"model/w": torch.arange(6.0).view(2, 3), "ema/w": torch.ones(2, 3)}
# Golden values of format version 1. Changing them makes existing checkpoints unreadable.
META = """{
 "version": 1,
 "progress": {
  "step": 25,
  "epoch": 2,
  "epoch_step": 5,
  "best": 0.25,
  "best_of": "average",
  "is_best": true,
  "top1": {
   "weights": 0.125,
   "average": 0.25
  },
  "pending_evaluation": false,
  "seconds": 1.5
 },
 "fingerprint": {
  "fixed": {
   "global_batch": 64,
   "data": "s\\u00e9t"
  },
  "free": {
   "lr": 0.1,
   "note": null
  }
 },
 "files": {
  "state.safetensors": {
   "bytes": 200,
   "xxh3": "30be464df6c8bbd1"
  }
 },
 "hash": "59e9161df0d592bc"
}
"""


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return CheckpointFolder(tmp_path).save(STATE, PROGRESS, FINGERPRINT)


def rewrite(path: Path, **changes: Any) -> None:
    """Change entries of the metadata or of its `progress`, and update the hash."""
    meta = json.loads((path / "meta.json").read_text())
    del meta["hash"]
    for name, value in changes.items():
        (meta["progress"] if name in meta["progress"] else meta)[name] = value
    (path / "meta.json").write_text(render_meta(meta))


def test_golden_files(saved: Path) -> None:
    assert (saved / "meta.json").read_text() == META
    assert xxhash.xxh3_64_hexdigest((saved / "state.safetensors").read_bytes()) == "30be464df6c8bbd1"


def test_hash_covers_all_chunks_of_a_file(tmp_path: Path) -> None:
    content = bytes(range(256)) * (9 << 12)
    (tmp_path / "file").write_bytes(content)
    assert hash_file(tmp_path / "file") == (9 << 20, xxhash.xxh3_64_hexdigest(content))
    (tmp_path / "empty").touch()
    assert hash_file(tmp_path / "empty") == (0, "2d06800538d394c2")


def test_checkpoint_is_opened_by_its_path(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved)
    for path in (saved, Path()):
        found = open_checkpoint(path)
        assert (found.path, found.progress, found.fingerprint) == (path, PROGRESS, FINGERPRINT)
        loaded = found.load()
        assert {name: tensor.tolist() for name, tensor in loaded.items()} == {
            name: tensor.tolist() for name, tensor in STATE.items()
        }
    with pytest.raises(DamagedCheckpoint) as error:
        open_checkpoint(saved / "step-25")
    assert str(error.value) == f"{saved}/step-25: not a checkpoint folder; expected a name like step-00001234"


def test_state_header_describes_the_model(tmp_path: Path) -> None:
    info = fat.WeightsInfo(size=64)
    path = CheckpointFolder(tmp_path, info=info).save(STATE, PROGRESS, FINGERPRINT)
    assert open_checkpoint(path).info() == info


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"step": 26}, "meta.json: written for step 26"),
        ({"epoch": 3}, "meta.json: step 25 contradicts step 5 of epoch 3"),
        ({"epoch": 0}, "meta.json: step 25 contradicts step 5 of epoch 0"),
        ({"epoch_step": 26}, "meta.json: step 25 contradicts step 26 of epoch 2"),
        ({"epoch": 1, "epoch_step": 26}, "meta.json: step 25 contradicts step 26 of epoch 1"),
        ({"best": 0.0}, "meta.json: marked as the best without an evaluation"),
        ({"pending_evaluation": True}, "meta.json: marked as the best without an evaluation"),
        ({"files": {}}, "meta.json: no state.safetensors"),
    ],
)
def test_contradictory_metadata_is_damage(saved: Path, changes: dict[str, Any], fact: str) -> None:
    rewrite(saved, **changes)
    with pytest.raises(DamagedCheckpoint) as error:
        open_checkpoint(saved)
    assert str(error.value) == f"{saved}: damaged ({fact})"


@pytest.mark.parametrize(
    "changes",
    [
        {"epoch": 0, "epoch_step": 25},
        {"epoch": 5, "epoch_step": 0},
        {"epoch": 1},
        {"is_best": False, "best": 0.0},
        {"is_best": False, "pending_evaluation": True, "top1": {}},
    ],
)
def test_consistent_metadata_is_accepted(saved: Path, changes: dict[str, Any]) -> None:
    rewrite(saved, **changes)
    progress = open_checkpoint(saved).progress
    assert {name: getattr(progress, name) for name in changes} == changes


def test_other_format_version_is_rejected(saved: Path) -> None:
    rewrite(saved, version=2)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(saved)
    assert not isinstance(error.value, DamagedCheckpoint)
    assert str(error.value) == (
        f"{saved}: checkpoint version 2, but this program reads version 1; resume with the program that wrote it, or "
        "use another run folder (--out)"
    )


def test_hash_mismatch_is_damage(saved: Path) -> None:
    with open(saved / "state.safetensors", "ab") as file:
        file.write(b"x")
    with pytest.raises(DamagedCheckpoint) as error:
        open_checkpoint(saved)
    assert str(error.value) == f"{saved}: damaged (state.safetensors does not match its hash)"
    meta = (saved / "meta.json").read_text()
    (saved / "meta.json").write_text(meta.replace("0.1", "0.2"))
    with pytest.raises(DamagedCheckpoint) as error:
        open_checkpoint(saved)
    assert str(error.value) == f"{saved}: damaged (meta.json does not match its hash)"


@pytest.mark.parametrize("name", ["meta.json", "state.safetensors"])
def test_missing_file_is_damage(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(DamagedCheckpoint) as error:
        open_checkpoint(saved)
    assert str(error.value) == f"{saved}: damaged ({name}: No such file or directory)"


def test_state_changed_after_verification_is_not_loaded(saved: Path) -> None:
    found, path = open_checkpoint(saved), saved / "state.safetensors"
    whole = path.read_bytes()
    for content in (whole[:-1] + b"x", whole[:-1], whole + b"x"):
        path.write_bytes(content)
        with pytest.raises(StorageFailed) as error:
            found.load()
        assert str(error.value) == f"{path}: has changed since it was checked; start the run again"
    path.unlink()
    with pytest.raises(UserError) as error:
        found.load()
    assert str(error.value) == f"{path}: missing; the run folder (--out) must be on storage that all nodes share"


def test_invalid_state_with_valid_hash_is_rejected(saved: Path) -> None:
    """The hash is valid, so the file was already invalid when it was written."""
    (saved / "state.safetensors").write_bytes(b"no tensors")
    size, digest = hash_file(saved / "state.safetensors")
    rewrite(saved, files={"state.safetensors": {"bytes": size, "xxh3": digest}})
    found = open_checkpoint(saved)
    for read in (found.load, found.info):
        with pytest.raises(CheckpointError) as error:
            read()
        message = str(error.value)
        assert message.startswith(f"{saved}/state.safetensors: ")
        assert "not a valid safetensors file (" in message or "invalid header (" in message
        assert message.endswith(f"); remove {saved}, then start the run again")


@pytest.mark.parametrize("name", ["meta.json", "state.safetensors"])
def test_unreadable_file_is_not_damage(saved: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file may be undamaged, so the run must not resume from an older checkpoint."""
    real = checkpoint.open_regular

    def denied(path: Path, *flags: int) -> int:
        if path.name == name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *flags)

    monkeypatch.setattr("launch.run.files.open_regular", denied)
    monkeypatch.setattr(checkpoint, "open_regular", denied)
    with pytest.raises(StorageFailed, match=f"{saved / name}: cannot be read .*Permission denied"):
        open_checkpoint(saved)

"""Checkpoints (launch/checkpoint.py): complete or absent, damage is noticed, old ones go."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from launch.checkpoint import CheckpointError, CheckpointFolder, Progress

FINGERPRINT = {"global_batch": 64}


def save(folder: CheckpointFolder, step: int, *, is_best: bool = False) -> Path:
    state = {"model/w": torch.full((8, 8), float(step)), "exp_avg/w": torch.zeros(8, 8)}
    return folder.save(state, Progress(step=step, epoch=step // 10, is_best=is_best, best=0.5), FINGERPRINT)


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    save(folder, 20)
    found, complaints = folder.newest()
    assert found is not None
    assert (found.progress.step, found.progress.epoch, found.fingerprint, complaints) == (20, 2, FINGERPRINT, [])
    assert found.load()["model/w"].eq(20).all()


def test_an_empty_folder_has_no_newest(tmp_path: Path) -> None:
    assert CheckpointFolder(tmp_path / "nothing").newest() == (None, [])


def test_the_newest_few_and_the_best_are_kept(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in (10, 20, 30, 40, 50):
        save(folder, step, is_best=step in (10, 20))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000020", "step-00000040", "step-00000050"]


def flip_a_byte(path: Path) -> None:
    data = bytearray((path / "state.safetensors").read_bytes())
    data[-5] ^= 1
    (path / "state.safetensors").write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path / "state.safetensors", 50)


def lose_meta(path: Path) -> None:
    (path / "meta.json").unlink()


def tear_meta(path: Path) -> None:
    (path / "meta.json").write_text('{"version": 1, "prog')


@pytest.mark.parametrize("damage", [flip_a_byte, truncate, lose_meta, tear_meta])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path: Path, damage) -> None:
    folder = CheckpointFolder(tmp_path)
    save(folder, 10)
    damage(save(folder, 20))
    found, complaints = folder.newest()
    assert found is not None
    assert found.progress.step == 10
    assert len(complaints) == 1
    assert "step-00000020" in complaints[0]


def test_a_half_written_checkpoint_does_not_count(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    save(folder, 10)
    (tmp_path / ".step-00000020.tmp").mkdir()
    found, _ = folder.newest()
    assert found is not None
    assert found.progress.step == 10
    save(folder, 20)
    assert not (tmp_path / ".step-00000020.tmp").exists()


def test_killed_while_it_replaces_a_checkpoint_the_replaced_one_is_found(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    saved = save(folder, 20)
    saved.rename(tmp_path / f".{saved.name}.replaced")
    found, complaints = folder.newest()
    assert found is not None
    assert (found.path, complaints) == (saved, [])
    assert [path.name for path in save(folder, 20).parent.iterdir()] == [saved.name]


def test_a_folder_that_cannot_be_written_is_an_error_and_loses_nothing(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    save(folder, 10)
    (tmp_path / ".step-00000020.tmp").write_text("a file where the temporary folder should be")
    with pytest.raises(CheckpointError, match="step-00000020"):
        save(folder, 20)
    found, _ = folder.newest()
    assert found is not None
    assert found.progress.step == 10

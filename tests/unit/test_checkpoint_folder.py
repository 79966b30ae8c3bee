"""Which checkpoints are kept, found and moved aside, and what failed saves say (launch/run/checkpoint_folder.py)."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from launch.run.checkpoint import CheckpointError, Fingerprint
from launch.run.checkpoint_folder import CheckpointFolder
from launch.run.checkpoint_writer import BackgroundWriter
from launch.run.progress import Progress
from shards.errors import UserError

FINGERPRINT = Fingerprint(fixed={}, free={})
STATE = {"w": torch.zeros(1)}


def save(folder: CheckpointFolder, step: int, *, is_best: bool = False) -> Path:
    return folder.save(STATE, Progress(step=step, epoch_step=step, is_best=is_best, best=0.5), FINGERPRINT)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def steps(folder: CheckpointFolder) -> list[int]:
    return [int(name.removeprefix("step-")) for name in names(folder.folder)]


def flip_state(path: Path) -> None:
    content = bytearray((path / "state.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "state.safetensors").write_bytes(content)


def test_three_newest_and_the_newest_best_are_kept(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    for step in range(1, 8):
        save(folder, step, is_best=step in (1, 2, 3))
    assert steps(folder) == [3, 5, 6, 7]


def test_the_best_is_kept_when_it_is_among_the_newest_too(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in range(1, 5):
        save(folder, step, is_best=step == 3)
    assert steps(folder) == [3, 4]


def test_the_newest_best_is_found_whatever_is_damaged(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints", keep=9)
    assert folder.best() is None
    saved = [save(folder, step, is_best=step in (1, 2, 3)) for step in (1, 2, 3, 4)]
    assert folder.best() == saved[2]
    (saved[2] / "meta.json").write_text("{}")
    assert folder.best() == saved[1]
    saved[1].rename(saved[1].with_name(f".{saved[1].name}.0123abcd.replaced"))
    assert folder.best() == saved[0], "one that is being replaced may go at any moment"


def test_an_empty_folder_is_one_without_checkpoints(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "deep" / "checkpoints")
    assert folder.is_empty()
    assert folder.set_aside() is None
    folder.prepare()
    assert names(folder.folder) == []
    (folder.folder / "notes").mkdir()
    (folder.folder / ".step-00000001.0123abcd.tmp").mkdir()
    assert folder.is_empty()
    assert folder.newest_step() is None
    save(folder, 1)
    assert not folder.is_empty()


def test_the_newest_step_counts_damaged_and_replaced_checkpoints(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    path = save(folder, 5)
    path.rename(tmp_path / ".step-00000012.0123abcd.replaced")
    assert folder.newest_step() == 12
    assert not folder.is_empty()
    shutil.rmtree(tmp_path)
    tmp_path.write_text("no folder")
    assert folder.newest_step() is None
    with pytest.raises(UserError, match=r"Not a directory; move it away, or use another run folder \(--out\)"):
        folder.newest()


def test_checkpoints_are_set_aside_under_the_next_free_name(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    for number in (1, 2, 3):
        save(folder, number)
        (folder.folder / "notes").touch()
        (folder.folder / ".step-00000009.0123abcd.tmp").mkdir()
        assert folder.set_aside() == tmp_path / f"checkpoints-before-{number}"
        assert names(tmp_path / f"checkpoints-before-{number}") == [".step-00000009.0123abcd.tmp", f"step-{number:08d}"]
        assert names(folder.folder) == ["notes"]


def test_prepare_restores_a_replaced_checkpoint_only_where_its_successor_is_missing(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    for path in [save(folder, step) for step in (1, 2)]:
        shutil.copytree(path, tmp_path / f".{path.name}.0123abcd.replaced")
    shutil.rmtree(tmp_path / "step-00000001")
    folder.prepare()
    assert names(tmp_path) == [".step-00000002.0123abcd.replaced", "step-00000001", "step-00000002"]
    found, _ = folder.newest()
    assert found is not None
    assert found.path == tmp_path / "step-00000002", "the complete one before the replaced one"
    save(folder, 3)
    assert steps(folder) == [1, 2, 3], "the next save removes what was replaced"


def test_a_checkpoint_found_damaged_does_not_count_until_it_is_written_again(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=1)
    save(folder, 1)
    flip_state(save(CheckpointFolder(tmp_path, keep=9), 2))
    found, complaints = folder.newest()
    assert found is not None
    assert (found.progress.step, complaints) == (
        1,
        [f"{tmp_path}/step-00000002: damaged (state.safetensors does not match its hash); skipped"],
    )
    save(folder, 2)
    assert steps(folder) == [2], "whole again, so the older one goes"


def test_checkpoints_of_later_steps_are_not_removed(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=1)
    for step in (5, 1, 2):
        save(folder, step)
    assert steps(folder) == [2, 5]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    folder = CheckpointFolder(tmp_path / "file" / "checkpoints")
    with pytest.raises(CheckpointError) as error:
        save(folder, 3)
    assert str(error.value) == (f"{tmp_path}/file/checkpoints/step-00000003: checkpoint not written (Not a directory)")
    with pytest.raises(UserError, match=f"^{tmp_path}/file/checkpoints: "):
        folder.prepare()


def test_a_state_that_cannot_be_saved_leaves_nothing(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    save(folder, 2)
    with pytest.raises(ValueError, match="non contiguous"):
        folder.save({"w": torch.zeros(2, 3).T}, Progress(step=2, epoch_step=2), FINGERPRINT)
    assert names(tmp_path) == ["step-00000002"]


def test_a_writer_counts_consecutive_failures_and_reports_each_once(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    writer = BackgroundWriter(folder)
    assert (writer.wait(), writer.failures, writer.saved, writer.reason, writer.complaints()) == (True, 0, None, "", [])
    first = Progress(step=1, epoch_step=1)
    writer.save(STATE, first, FINGERPRINT)
    assert writer.wait()
    assert (writer.saved, writer.complaints()) == (first, [])
    shutil.rmtree(folder.folder)
    folder.folder.touch()
    for failures in (1, 2):
        writer.save(STATE, Progress(step=2, epoch_step=2), FINGERPRINT)
        assert not writer.wait()
        assert (writer.failures, writer.saved) == (failures, first)
    reason = f"{folder.folder}/step-00000002: checkpoint not written (File exists)"
    assert (writer.reason, writer.complaints(), writer.complaints()) == (reason, [reason, reason], [])
    folder.folder.unlink()
    last = Progress(step=3, epoch_step=3)
    writer.save(STATE, last, FINGERPRINT)
    writer.close()
    assert (writer.failures, writer.saved, writer.complaints()) == (0, last, [])
    with pytest.raises(RuntimeError, match="after shutdown"):
        writer.save(STATE, last, FINGERPRINT)

"""Choosing, keeping and archiving checkpoints, and error messages of saves (launch/run/checkpoint_folder.py)."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from safetensors import SafetensorError

import fat
from launch.run.checkpoint import CheckpointError, Fingerprint, Meta, read_meta
from launch.run.checkpoint_folder import UNFINISHED, CheckpointFolder
from launch.run.checkpoint_writer import BackgroundWriter
from launch.run.progress import Progress
from launch.run.weights_files import WeightsFiles
from shards.errors import StorageFailed, UserError

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


def test_best_among_the_newest_needs_no_extra_place(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in range(1, 5):
        save(folder, step, is_best=step == 3)
    assert steps(folder) == [3, 4]


def test_folder_without_checkpoints_is_empty(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "deep" / "checkpoints")
    assert folder.is_empty()
    assert folder.archive() is None
    folder.prepare()
    assert names(folder.folder) == []
    (folder.folder / "notes").mkdir()
    (folder.folder / ".step-00000001.0123abcd.tmp").mkdir()
    assert folder.is_empty()
    assert folder.newest_step() is None
    save(folder, 1)
    assert not folder.is_empty()


def test_newest_step_includes_damaged_and_replaced_checkpoints(tmp_path: Path) -> None:
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


def test_checkpoints_are_archived_under_the_next_free_name(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    for number in (1, 2, 3):
        save(folder, number)
        (folder.folder / "notes").touch()
        (folder.folder / ".step-00000009.0123abcd.tmp").mkdir()
        assert folder.archive() == tmp_path / f"checkpoints-before-{number}"
        assert names(tmp_path / f"checkpoints-before-{number}") == [".step-00000009.0123abcd.tmp", f"step-{number:08d}"]
        assert names(folder.folder) == ["notes"]


def test_prepare_restores_a_replaced_checkpoint_only_if_its_successor_is_missing(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    for path in [save(folder, step) for step in (1, 2)]:
        shutil.copytree(path, tmp_path / f".{path.name}.0123abcd.replaced")
    shutil.rmtree(tmp_path / "step-00000001")
    folder.prepare()
    assert names(tmp_path) == [".step-00000002.0123abcd.replaced", "step-00000001", "step-00000002"]
    found, _ = folder.newest()
    assert found is not None
    assert found.path == tmp_path / "step-00000002", "the complete checkpoint is preferred to the replaced one"
    save(folder, 3)
    assert steps(folder) == [1, 2, 3], "the next save removes the replaced checkpoint"


def test_damaged_checkpoint_does_not_count_until_it_is_saved_again(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=1)
    save(folder, 1)
    flip_state(save(CheckpointFolder(tmp_path, keep=9), 2))
    found, skipped = folder.newest()
    assert found is not None
    assert (found.progress.step, skipped) == (
        1,
        [f"{tmp_path}/step-00000002: damaged (state.safetensors does not match its hash); skipped"],
    )
    save(folder, 2)
    assert steps(folder) == [2], "it is undamaged again, so the older checkpoint is removed"


def test_checkpoints_of_later_steps_are_not_removed(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=1)
    for step in (5, 1, 2):
        save(folder, step)
    assert steps(folder) == [2, 5]


def test_checkpoint_folder_that_cannot_be_created_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    folder = CheckpointFolder(tmp_path / "file" / "checkpoints")
    with pytest.raises(CheckpointError) as error:
        save(folder, 3)
    assert str(error.value) == (f"{tmp_path}/file/checkpoints/step-00000003: checkpoint not written (Not a directory)")
    with pytest.raises(UserError, match=f"^{tmp_path}/file/checkpoints: "):
        folder.prepare()


def test_unsupported_state_leaves_no_files(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    save(folder, 2)
    with pytest.raises(ValueError, match="non contiguous"):
        folder.save({"w": torch.zeros(2, 3).T}, Progress(step=2, epoch_step=2), FINGERPRINT)
    assert names(tmp_path) == ["step-00000002"]


def unfinished(name: str) -> tuple[str, str]:
    """Return the checkpoint and the kind (tmp or replaced) in the name of an unfinished checkpoint."""
    found = UNFINISHED.fullmatch(name)
    assert found is not None, name
    return found[1], found[2]


def test_files_of_a_killed_save_are_removed_at_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []

    def killed(state: object, path: Path, header: object) -> None:
        written.append(path)
        (path.parent / ".state.safetensors.tmp123").write_bytes(b"half")  # a temporary file of safetensors
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", killed)
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)
    folder = CheckpointFolder(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        save(folder, 7)
    assert unfinished(written[0].parent.name) == ("step-00000007", "tmp")
    monkeypatch.undo()
    folder.prepare()
    assert names(tmp_path) == []


def test_checkpoint_is_renamed_before_it_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the trainer is killed during the removal, no partial checkpoint may have the name of a complete one."""
    folder = CheckpointFolder(tmp_path, keep=1)
    replaced = save(folder, 1)
    replaced.rename(tmp_path / ".step-00000001.0123abcd.replaced")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *_, **__: None)
        save(folder, 2)
        save(folder, 3)
    left = [unfinished(name) for name in names(tmp_path) if name != "step-00000003"]
    assert left == [("step-00000001", "tmp"), ("step-00000002", "tmp")]


def test_replaced_checkpoint_with_a_file_of_the_user_is_kept(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    kept = save(folder, 1).rename(tmp_path / ".step-00000001.0123abcd.replaced")
    (kept / "notes.txt").write_text("mine")
    save(folder, 1)
    assert names(tmp_path) == [kept.name, "step-00000001"]


def test_failed_removal_does_not_fail_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".step-00000001.0123abcd.tmp").mkdir()
    monkeypatch.setattr("os.rmdir", raise_eio)
    CheckpointFolder(tmp_path).prepare()
    assert names(tmp_path) == [".step-00000001.0123abcd.tmp"]


def test_unreadable_checkpoint_is_kept_and_others_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = CheckpointFolder(tmp_path, keep=1)
    for step in (1, 2, 3, 4):
        CheckpointFolder(tmp_path, keep=9).save(STATE, Progress(step=step, epoch_step=step), FINGERPRINT)

    def read_some(path: Path, step: int) -> Meta:
        if step == 2:  # it may be the best
            raise StorageFailed("an I/O error")
        return read_meta(path, step)

    monkeypatch.setattr("launch.run.checkpoint_folder.read_meta", read_some)
    save(folder, 5)
    assert steps(folder) == [2, 5]


def test_checkpoint_folder_that_cannot_be_listed_is_reported(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(UserError, match=f"^{tmp_path / 'checkpoints'}: Not a directory; move it away"):
        CheckpointFolder(tmp_path / "checkpoints").newest()


def test_safetensors_error_is_reported_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(CheckpointError, match=r"step-00000001: checkpoint not written \(Error while serializing: I/O"):
        save(CheckpointFolder(tmp_path), 1)


def test_replaced_checkpoint_is_restored_if_the_new_save_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = CheckpointFolder(tmp_path)
    save(folder, 1)
    rename = Path.rename

    def fail_once(path: Path, target: Path) -> Path:
        return raise_eio() if path.suffix == ".tmp" else rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail_once)
        with pytest.raises(CheckpointError, match="step-00000001: checkpoint not written"):
            save(folder, 1)
    assert names(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "fault"), UserError("fault")])
def test_save_succeeds_if_removing_old_checkpoints_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(_: object) -> None:
        raise error

    folder = CheckpointFolder(tmp_path)
    monkeypatch.setattr(folder, "_remove_old", fail)
    assert save(folder, 1) == tmp_path / "step-00000001"


def test_failed_archive_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    save(folder, 1)
    monkeypatch.setattr(Path, "rename", raise_eio)
    with pytest.raises(UserError, match=rf"^{folder.folder}: the run folder cannot be written \(Input/output error\)"):
        folder.archive()


def raise_eio(*_: object, **__: object) -> NoReturn:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_writer_counts_consecutive_failures_and_reports_each_once(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    writer = BackgroundWriter(folder, WeightsFiles(tmp_path, fat.WeightsInfo()))
    assert (writer.wait(), writer.failures, writer.saved, writer.reason, writer.errors()) == (True, 0, None, "", [])
    first = Progress(step=1, epoch_step=1)
    writer.save(STATE, first, FINGERPRINT)
    assert writer.wait()
    assert (writer.saved, writer.errors()) == (first, [])
    shutil.rmtree(folder.folder)
    folder.folder.touch()
    for failures in (1, 2):
        writer.save(STATE, Progress(step=2, epoch_step=2), FINGERPRINT)
        assert not writer.wait()
        assert (writer.failures, writer.saved) == (failures, first)
    reason = f"{folder.folder}/step-00000002: checkpoint not written (File exists)"
    assert (writer.reason, writer.errors(), writer.errors()) == (reason, [reason, reason], [])
    folder.folder.unlink()
    last = Progress(step=3, epoch_step=3)
    writer.save(STATE, last, FINGERPRINT)
    writer.close()
    assert (writer.failures, writer.saved, writer.errors()) == (0, last, [])
    with pytest.raises(RuntimeError, match="after shutdown"):
        writer.save(STATE, last, FINGERPRINT)

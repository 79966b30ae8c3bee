"""Checkpoints on rank 0's host (--local-checkpoint-every)."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.monitor.goodput import SAVING, goodput
from launch.resume.folder import RunFolder
from launch.run.metrics_file import read_metrics
from launch.run.progress import Progress
from launch.train import main as train
from tests.support.commands import run
from tests.support.launching import lines
from tests.support.run_folder_starts import STEPS, run_folder, save

Start = Callable[..., RunFolder]


def progress(step: int) -> Progress:
    return Progress(step=step, epoch=step // STEPS, epoch_step=step % STEPS)


@pytest.fixture
def start(digits: Path, tmp_path: Path) -> Start:
    """Start a run in tmp_path/run whose local checkpoints are in tmp_path/memory."""
    (tmp_path / "memory").mkdir()
    options = ("--local-checkpoint-every", "1", "--local-checkpoint-dir", str(tmp_path / "memory"))
    return lambda *more, out="run": run_folder(digits, tmp_path / out, *options, *more)


def crashed(folder: RunFolder, *, shared: int, local: int) -> None:
    """Save a checkpoint in the run folder and a local one, without the end of the run."""
    folder.resume()
    save(folder, shared)
    folder.save_locally(progress(local))
    assert folder._writer.wait()
    assert folder.save_errors() == []


def files(root: Path) -> list[str]:
    return sorted(path.name for path in root.rglob("step-*"))


def test_a_restart_on_the_same_host_resumes_from_the_newer_local_checkpoint(start: Start, tmp_path: Path) -> None:
    first = start()
    crashed(first, shared=4, local=7)
    first.save_locally(progress(9))
    assert first._writer.wait()
    assert files(tmp_path / "memory") == ["step-00000009"]  # only the newest one is kept
    again = start()
    resumed, messages = again.resume()
    assert resumed.step == 9
    assert messages[-1].startswith(f"resuming from {tmp_path / 'memory'}")
    assert again.newest_step == 4  # from which a start on another host would resume


def test_metrics_that_could_not_be_written_are_kept_with_a_local_checkpoint(start: Start, tmp_path: Path) -> None:
    """The disk of the run folder is full until the run is killed; a restart does not repeat the steps of the lines."""
    first, metrics = start(), tmp_path / "run" / "metrics.jsonl"
    crashed(first, shared=4, local=5)
    metrics.write_bytes(b'{"step": 3}\n{"step": 4}\n')
    first.save_locally(progress(6), metrics=b'{"step": 5}\n{"step": 6}\n')
    first.save_locally(progress(7), metrics=b'{"step": 5}\n{"step": 6}\n{"step": 7}\n')
    assert first._writer.wait()
    assert len(list((tmp_path / "memory").rglob("*.metrics.jsonl"))) == 1
    for _ in range(2):  # the second restart finds that they have been written
        assert start().resume()[0].step == 7
        assert [json.loads(line) for line in metrics.read_text().splitlines()] == [{"step": n} for n in (3, 4, 5, 6, 7)]


def test_metrics_that_were_written_later_are_not_repeated(start: Start, tmp_path: Path) -> None:
    """The disk was full when the local checkpoint was written, but not any more when the run was killed."""
    first, metrics = start(), tmp_path / "run" / "metrics.jsonl"
    crashed(first, shared=4, local=5)
    first.save_locally(progress(6), metrics=b'{"step": 5}\n{"step": 6}\n')
    assert first._writer.wait()
    metrics.write_bytes(b'{"step": 4}\n{"step": 5}\n{"step": 6}\n{"step": 7}\n{"st')
    assert start().resume()[0].step == 6
    assert metrics.read_bytes() == b'{"step": 4}\n{"step": 5}\n{"step": 6}\n{"step": 7}\n{"st'


def test_a_local_checkpoint_without_unwritten_metrics_changes_nothing(start: Start, tmp_path: Path) -> None:
    first = start()
    crashed(first, shared=4, local=5)
    first.save_locally(progress(6), metrics=b'{"step": 6}\n')
    first.save_locally(progress(8))
    assert first._writer.wait()
    assert list((tmp_path / "memory").rglob("*.metrics.jsonl")) == []
    assert start().resume()[0].step == 8
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("elsewhere", [5, 7, 12])
def test_local_checkpoints_are_ignored_after_another_host_has_continued_the_run(
    start: Start, tmp_path: Path, elsewhere: int
) -> None:
    crashed(start(), shared=4, local=7)
    kept = tmp_path / "kept"
    shutil.move(tmp_path / "memory", kept)
    (tmp_path / "memory").mkdir()
    crashed(start(), shared=elsewhere, local=elsewhere + 1)  # on another host
    shutil.rmtree(tmp_path / "memory")
    shutil.move(kept, tmp_path / "memory")
    assert start().resume()[0].step == elsewhere
    assert files(tmp_path / "memory") == []  # they were removed


@pytest.mark.parametrize("choice", ["never", "step:4", "best"])
def test_local_checkpoints_are_ignored_after_the_history_has_changed(start: Start, tmp_path: Path, choice: str) -> None:
    first = start()
    first.resume()
    first.save(progress(4).evaluated({"weights": 0.5}))
    first.save_locally(progress(6))
    assert first._writer.wait()
    changed = start("--resume", choice)
    assert changed.resume()[0].step == (0 if choice == "never" else 4)
    changed._writer.close()
    assert start().resume()[0].step == (0 if choice == "never" else 4)


def test_a_damaged_local_checkpoint_is_skipped_with_a_warning(start: Start, tmp_path: Path) -> None:
    crashed(start(), shared=4, local=7)
    damage(tmp_path / "memory")
    resumed, messages = start().resume()
    assert resumed.step == 4
    assert any("step-00000007: damaged (state.safetensors does not match its hash)" in message for message in messages)


def damage(folder: Path, name: str = "state.safetensors") -> None:
    """Change the last byte of the newest file of this name in a folder."""
    with max(folder.rglob(name)).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")


@pytest.mark.parametrize("older", [True, False])
def test_a_local_checkpoint_is_used_if_the_one_that_it_follows_is_damaged(
    start: Start, tmp_path: Path, older: bool
) -> None:
    """Only its state is damaged: meta.json tells that the local checkpoint follows it."""
    first, checkpoints = start(), tmp_path / "run" / "checkpoints"
    first.resume()
    if older:
        save(first, 2)
    save(first, 4)
    first.save_locally(progress(7))
    assert first._writer.wait()
    damage(checkpoints)
    again = start()
    resumed, messages = again.resume()
    assert resumed.step == 7
    assert messages[-1].startswith(f"resuming from {tmp_path / 'memory'}")
    assert any("step-00000004: damaged" in message for message in messages)
    assert again.has_checkpoint == older  # else the next checkpoint is written to the run folder
    again.save_locally(progress(9))
    assert again._writer.wait()
    assert start().resume()[0].step == 9
    save(again, 11)
    assert start().resume()[0].step == 11


def test_a_local_checkpoint_is_not_used_if_it_is_unknown_what_it_follows(start: Start, tmp_path: Path) -> None:
    first = start()
    first.resume()
    save(first, 2)
    save(first, 4)
    first.save_locally(progress(7))
    assert first._writer.wait()
    damage(tmp_path / "run" / "checkpoints" / "step-00000004", "meta.json")
    assert start().resume()[0].step == 2


def test_another_run_does_not_use_them(start: Start, tmp_path: Path) -> None:
    crashed(start(), shared=4, local=7)
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    assert start(out="other").resume()[0].step == 4
    assert files(tmp_path / "memory") == ["step-00000007"]


def test_they_are_removed_at_the_end_of_the_run(start: Start, tmp_path: Path) -> None:
    folder = start()
    with folder:
        crashed(folder, shared=4, local=7)
    assert files(tmp_path / "memory") == []


def test_a_full_memory_is_a_warning(start: Start, tmp_path: Path) -> None:
    folder = start()
    crashed(folder, shared=4, local=7)
    shutil.rmtree(tmp_path / "memory")
    (tmp_path / "memory").write_text("in the way")
    folder.save_locally(progress(9))
    assert folder._writer.wait()  # does not count as a failed save
    (message,) = folder.save_errors()
    assert "step-00000009: checkpoint not written" in message


def test_a_folder_that_cannot_be_used_is_a_warning(start: Start, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    unusable = ("--local-checkpoint-dir", str(tmp_path / "file"))
    folder = start(*unusable)
    folder.resume()
    folder.save(progress(4))
    assert folder._writer.wait()
    (message,) = folder.save_errors()
    assert message.startswith(f"--local-checkpoint-dir {tmp_path / 'file'}")
    assert message.endswith("use another --local-checkpoint-dir")
    folder.save_locally(progress(5))
    assert folder._writer.wait()
    assert "the local checkpoint of step 5 is not written" in folder.save_errors()[0]
    for choice in ("auto", "step:4"):
        resumed, messages = start(*unusable, "--resume", choice).resume()
        assert resumed.step == 4
        assert f"warning: {message}" in messages


def test_a_folder_of_another_user_is_not_used(start: Start, tmp_path: Path) -> None:
    local = tmp_path / "memory" / f"fat-checkpoints-{os.geteuid()}"
    crashed(start(), shared=4, local=7)
    local.rename(tmp_path / "theirs")
    local.symlink_to(tmp_path / "theirs")
    folder = start()
    with folder:
        resumed, messages = folder.resume()
    assert resumed.step == 4
    assert any("a symbolic link or a file, not a folder" in message for message in messages)
    assert files(tmp_path / "theirs") == ["step-00000007"]


def test_local_checkpoints_are_not_used_after_a_second_return_to_the_same_step(start: Start, tmp_path: Path) -> None:
    crashed(start(), shared=4, local=7)
    for local in (9, 6):
        (tmp_path / "run" / "origin.json").unlink(missing_ok=True)
        folder = start("--resume", "step:4")
        assert folder.resume()[0].step == 4
        folder.save_locally(progress(local))
        assert folder._writer.wait()
    assert start().resume()[0].step == 6


def test_the_time_of_a_local_checkpoint_is_not_that_of_training(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise rank 0, which alone copies its state, would be reported as slow."""
    saved = RunFolder.save_locally

    def slowly(folder: RunFolder, state: Progress, *, metrics: bytes = b"") -> None:
        time.sleep(2)
        saved(folder, state, metrics=metrics)

    monkeypatch.setattr(RunFolder, "save_locally", slowly)
    options = (
        *("--data", digits, "--out", tmp_path / "run", "--model", "tests.support.models:with_classifier"),
        *("--size", "32", "--augment", "light", "--compile", "off", "--global-batch", "32", "--classes-subset", "3"),
        *("--fraction", "0.3", "--epochs", "1", "--log-every", "1", "--local-checkpoint-every", "1"),
        *("--local-checkpoint-dir", tmp_path),
    )
    assert run(train, *options) == 0
    saves = lines(tmp_path / "run", "checkpoint")
    assert [(line["step"], line.get("local", False)) for line in saves] == [
        (1, False),
        (2, True),
        (3, True),
        (4, False),
    ]
    assert all(line["seconds"] >= 2 for line in saves[1:3])
    assert all(line["seconds"] < 2 for line in lines(tmp_path / "run", "train") if line["step"] > 1)
    assert goodput(read_metrics(tmp_path / "run")).categories[SAVING] >= 4

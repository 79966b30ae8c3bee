"""The run folder (launch/resume/folder.py): resuming, rejected checkpoints, failed saves, finishing."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fat
from launch.config.command_line import parse
from launch.config.errors import RecipeError
from launch.resilience.stop_signals import StopSignals
from launch.resume.decision import decide_resume
from launch.resume.folder import RunFolder
from launch.run import checkpoint, weights_files
from launch.run.checkpoint import CheckpointError
from launch.run.checkpoint_writer import MAX_FAILURES
from launch.run.progress import Progress
from launch.run.status import RunFailed, read_content, read_status, write_status
from launch.train import RESTART_COUNTS, plot, run_recipe
from shards.errors import StorageFailed, UserError
from shards.files.durable import is_temporary, temporary_name
from tests.support.disks import fill, small_disk
from tests.support.run_folder_starts import run_folder, save
from tests.support.training_loop import CONFIG

Folders = Callable[..., RunFolder]


@pytest.fixture
def folders(digits: Path, tmp_path: Path) -> Folders:
    """Return a function that creates the run folder of a start, with a small network."""

    def make(*options: str, out: Path = tmp_path / "run") -> RunFolder:
        return run_folder(digits, out, *options)

    return make


def start(folders: Folders, *steps: int) -> Path:
    """Save checkpoints of a run that is then abandoned; return its folder of checkpoints."""
    folder = folders()
    folder.resume()
    save(folder, *steps)
    assert folder._writer.wait()
    return folder.path / "checkpoints"


def edit(path: Path, change: Callable[[dict[str, Any]], object], *, with_hash: bool) -> None:
    """Change the metadata of a checkpoint, with or without updating its hash."""
    meta = json.loads((path / "meta.json").read_text())
    found = meta.pop("hash")
    change(meta)
    text = checkpoint.render_meta(meta) if with_hash else json.dumps({**meta, "hash": found})
    (path / "meta.json").write_text(text)


def test_damaged_fingerprint_falls_back_to_the_previous_checkpoint(folders: Folders) -> None:
    checkpoints = start(folders, 14, 21)
    edit(checkpoints / "step-00000021", lambda meta: meta["fingerprint"]["fixed"].update(seed=1), with_hash=False)
    progress, messages = folders().resume()
    assert progress.step == 14
    assert any("step-00000021: damaged (meta.json does not match its hash); skipped" in line for line in messages)


def test_checkpoint_of_a_run_with_other_options_is_rejected(folders: Folders) -> None:
    start(folders, 14)
    with pytest.raises(CheckpointError, match=r"saved by a run with other options \(seed was 0, now 1\)"):
        folders("--seed", "1").resume()


def test_position_that_contradicts_the_plan_is_rejected(folders: Folders) -> None:
    checkpoints = start(folders, 21)
    position = {"epoch": 1, "epoch_step": 11}
    edit(checkpoints / "step-00000021", lambda meta: meta["progress"].update(position), with_hash=True)
    with pytest.raises(CheckpointError, match="step 21 is not step 11 of epoch 1, with 22 steps per epoch"):
        folders().resume()


def test_damaged_checkpoints_are_archived_if_none_is_undamaged(folders: Folders) -> None:
    checkpoints = start(folders, 14, 21)
    for path in checkpoints.iterdir():
        (path / "meta.json").unlink()
    (checkpoints.parent / "metrics.jsonl").write_text("{}\n")
    for name in ("evaluation.safetensors", "hardest.jpg"):
        (checkpoints.parent / name).touch()
    progress, messages = folders().resume()
    assert progress.step == 0
    assert "all checkpoints are damaged, so the run starts from the beginning" in messages[2]
    aside = checkpoints.with_name("checkpoints-before-1")
    moved = sorted(path.name for path in aside.iterdir())
    steps = ["step-00000014", "step-00000021"]
    assert moved == ["evaluation.safetensors", "hardest.jpg", "metrics.jsonl", *steps, "weights-last.safetensors"]


def test_unreadable_checkpoints_end_the_start(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = start(folders, 14, 21)

    def failing(path: Path, *_: object, **__: object) -> bytes:
        raise OSError(5, os.strerror(5), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "read_regular", failing)
        with pytest.raises(StorageFailed, match=r"cannot be read \(Input/output error\); check the storage") as failed:
            folders().resume()
    assert failed.value.exit_code == 1
    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", failing)
        with pytest.raises(StorageFailed, match="checkpoints: cannot be read"):
            decide_resume(folders().path, "auto")
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000014", "step-00000021"]


@pytest.mark.parametrize(
    ("option", "restarts", "resume"),
    [
        ("never", {"SLURM_RESTART_COUNT": "0", "TORCHELASTIC_RESTART_COUNT": "0"}, "never"),
        ("never", {"SLURM_RESTART_COUNT": "1"}, "auto"),
        ("never", {"TORCHELASTIC_RESTART_COUNT": "1"}, "auto"),
        ("never", {}, "never"),
        ("auto", {"SLURM_RESTART_COUNT": "2"}, "auto"),
        ("step:5", {"SLURM_RESTART_COUNT": "1"}, "step:5"),  # RUN/origin.json tells that this has been done
    ],
)
def test_restart_by_slurm_or_torchrun_resumes_despite_resume_never(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, option: str, restarts: dict[str, str], resume: str
) -> None:
    """--resume never applies to the run folder when the job was submitted, not when it is restarted."""
    seen: list[str] = []
    monkeypatch.setattr("launch.train.show_run", lambda recipe, _: seen.append(recipe.checkpoint.resume))
    for name in RESTART_COUNTS:
        monkeypatch.delenv(name, raising=False)
    for name, count in restarts.items():
        monkeypatch.setenv(name, count)
    recipe = parse(["--data", "x", "--out", str(tmp_path), "--resume", option, "--dry-run"])
    assert run_recipe(recipe, StopSignals()) == 0
    assert seen == [resume]


def renamed(state: dict[str, torch.Tensor], name: str) -> None:
    state[f"{name}x"] = state.pop(name)


def reshaped(state: dict[str, torch.Tensor], name: str) -> None:
    state[name] = state[name].flatten()[:1].clone()


def halved(state: dict[str, torch.Tensor], name: str) -> None:
    state[name] = state[name].half()


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (renamed, "model", "1 missing, such as model/.*; 1 unknown, such as model/.*x"),
        (renamed, "exp_avg", "1 missing, such as exp_avg/.*; 1 unknown"),
        (reshaped, "model", r"1 of another shape or dtype, such as model/.* is \[1\] torch.float32, expected \["),
        (reshaped, "exp_avg_sq", r"such as exp_avg_sq/.* is \[1\]"),
        (halved, "model", "is .* torch.float16, expected .* torch.float32"),
    ],
)
def test_tensors_that_do_not_fit_the_model_are_rejected_by_name(
    folders: Folders, change: Callable[..., None], kind: str, message: str
) -> None:
    path = start(folders, 14) / "step-00000014"
    state = load_file(path / "state.safetensors")
    change(state, next(name for name in sorted(state) if name.startswith(f"{kind}/") and state[name].ndim > 1))
    save_file(state, path / "state.safetensors")
    size, digest = checkpoint.hash_file(path / "state.safetensors")
    entry = {"state.safetensors": {"bytes": size, "xxh3": digest}}
    edit(path, lambda meta: meta.update(files=entry), with_hash=True)
    with pytest.raises(RecipeError, match=f"the checkpoint belongs to another model: .*{message}"):
        folders().resume()


def test_invalid_state_with_a_valid_hash_ends_the_start(folders: Folders) -> None:
    path = start(folders, 14) / "step-00000014"
    (path / "state.safetensors").write_bytes(b"\xff" * 100)
    size, digest = checkpoint.hash_file(path / "state.safetensors")
    entry = {"state.safetensors": {"bytes": size, "xxh3": digest}}
    edit(path, lambda meta: meta.update(files=entry), with_hash=True)
    with pytest.raises(CheckpointError, match=r"invalid header .*; remove .*step-00000014, then start the run again"):
        folders().resume()


def test_consecutive_failed_saves_end_the_run(folders: Folders, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "8m") as disk:
        folder = folders(out=disk / "run")
        folder.resume()

        def train() -> None:
            with folder:
                save(folder, 2)
                assert folder._writer.wait()
                fill(disk)
                for step in range(4, 4 + MAX_FAILURES + 1):
                    folder.save(Progress(step=step, epoch_step=step))

        with pytest.raises(RunFailed, match="3 consecutive checkpoints could not be written, the last") as failed:
            train()
        assert failed.value.exit_code == 1
        assert read_status(disk / "run") == "failed"
        assert json.loads((disk / "run" / "status").read_text())["step"] == 2  # step of the newest checkpoint on disk
        assert [path.name for path in (disk / "run" / "checkpoints").iterdir()] == ["step-00000002"]


@pytest.mark.parametrize("last", ["checkpoint", "weights"])
def test_run_without_its_last_checkpoint_or_weights_is_failed(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    with small_disk(tmp_path / "disk", "8m") as disk:
        folder = folders(out=disk / "run")
        folder.resume()
        progress = Progress(step=22, epoch=1)
        if last == "weights":  # the disk fills up after the checkpoint was saved
            original = weights_files.write_weights

            def full(*args: Any) -> None:
                fill(disk)
                original(*args)

            monkeypatch.setattr(weights_files, "write_weights", full)

        def end() -> None:
            with folder:
                if last == "checkpoint":
                    fill(disk)
                folder.save(progress)
                folder.save_errors()
                folder.finish(progress)

        with pytest.raises(RunFailed, match=f"{last}.* could not be written.*start the run again: it resumes"):
            end()
        assert read_status(disk / "run") == "failed"
        assert not list((disk / "run").glob("*weights*"))
        (disk / "of-others").unlink()
        monkeypatch.undo()
        restarted = folders(out=disk / "run")
        resumed, _ = restarted.resume()
        with restarted:
            restarted.save(progress)
            restarted.finish(progress)
        assert resumed.step == (22 if last == "weights" else 0)
        assert read_status(disk / "run") == "finished"
        assert "head.bias" in load_file(disk / "run" / "weights-last.safetensors")


@pytest.mark.parametrize(("options", "expected"), [(("--drop-path", "0"), 0.0), ((), 0.05)])
def test_exported_weights_have_the_trained_config(
    folders: Folders, options: tuple[str, ...], expected: float
) -> None:
    folder = folders(*options)
    folder.resume()
    with folder:
        folder.save(Progress(step=22, epoch=1))
        folder.finish(Progress(step=22, epoch=1))
    config = fat.read_info(folder.path / "weights-last.safetensors").config
    assert config is not None
    assert config.drop_path == expected


def test_failed_plot_does_not_fail_the_run(folders: Folders) -> None:
    folder = folders()
    folder.resume()
    progress = Progress(step=22, epoch=1)
    with folder:
        folder.save(progress)
        folder.finish(progress)
        message = plot(folder.path)  # there is no metrics.jsonl
    assert message.startswith("warning: the curves could not be plotted (")
    assert read_status(folder.path) == "finished"
    mode = (folder.path / "weights-last.safetensors").stat().st_mode & 0o777
    assert mode == (folder.path / "status").stat().st_mode & 0o777  # both follow the umask


def test_temporary_files_of_killed_starts_are_removed(folders: Folders) -> None:
    path = start(folders, 14).parent
    written = (
        "recipe.json", "curves.png", "status", "weights-last.safetensors", "weights-ema-best.safetensors", "probe",
        "evaluation.safetensors", "hardest.jpg", "first-batch.jpg",
    )  # fmt: skip
    temporary = [temporary_name(path / name).name for name in written]
    others = [".weights-last.safetensors.mine.tmp", "recipe.json.0123abcd0123abcd.tmp", ".notes.0123abcd0123abcd.tmp"]
    for name in (*temporary, *others):
        (path / name).touch()
    folders().resume()
    assert not [name for name in temporary if (path / name).exists()]
    assert all((path / name).exists() for name in others)


def test_temporary_name_of_weights_is_recognized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = []
    monkeypatch.setattr(os, "replace", lambda temporary, _: names.append(Path(temporary).name))
    fat.save_weights(fat.FAT(CONFIG), tmp_path / "weights-last.safetensors")
    assert [is_temporary(name, r"weights-last\.safetensors") for name in names] == [True]


@pytest.mark.parametrize(
    ("name", "fact"),
    [
        ("recipe.json", r"the run folder cannot be written \(recipe.json: Is a directory\); move the file at this"),
        ("metrics.jsonl", r"metrics\.jsonl: not a regular file; move it away"),
    ],
)
def test_folder_in_place_of_a_file_is_rejected(folders: Folders, name: str, fact: str) -> None:
    folder = folders()
    (folder.path / name).mkdir()
    with pytest.raises(UserError, match=fact) as refused:
        folder.resume()
    assert refused.value.exit_code == 2


def test_status_keeps_the_reason_of_another_rank_and_adds_the_step(folders: Folders) -> None:
    folder = folders()
    folder.resume()
    with contextlib.suppress(RuntimeError), folder:
        save(folder, 4)
        write_status(folder.path, "failed", reason="rank 1 knows", nodes=["b"])  # without a step
        raise RuntimeError("connection closed by peer")
    content = read_content(folder.path)
    assert content is not None
    assert (content.status, content.step, content.reason, content.nodes) == ("failed", 4, "rank 1 knows", ["b"])

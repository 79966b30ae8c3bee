"""Files that the project did not write are not overwritten: in a run folder, and at default output names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launch.cli import main as pipeline
from launch.config.command_line import parse
from launch.resilience.foreign_files import check_run_folder
from launch.resilience.stop_signals import StopSignals
from launch.run.checkpoint import Fingerprint
from launch.run.checkpoint_folder import CheckpointFolder
from launch.run.progress import Progress
from launch.run.status import BEFORE_NAME, STATUS_NAME
from launch.submit import main as submit
from launch.train import run_recipe
from shards.errors import UserError
from shards.files.lock import file_lock
from shards.files.output import MARK, OutputError, check_output
from tests.support.run_folders import write_run

CONTENT = b"years of work"
NAMES = (
    "recipe.json", "classes.json", "status", "metrics.jsonl", "curves.png", "weights.safetensors",
    "weights-ema.safetensors", "evaluation.safetensors", "first-batch.jpg", "hardest.jpg", "wandb-id",
)  # fmt: skip


def foreign(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(CONTENT)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_with_a_file_that_training_would_overwrite_is_rejected(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"is not a run folder, but contains {name}, which .* use another run folder"):
        check_run_folder(foreign(tmp_path / "results", name))


@pytest.mark.parametrize("names", [(), ("thesis.tex", "step.json", "mystatus", "weights.bin", "SAVE")])
def test_other_files_do_not_matter(names: tuple[str, ...], tmp_path: Path) -> None:
    folder = foreign(tmp_path / "folder", *names)
    (folder / "recipe.json").touch()  # an empty file has nothing to lose
    (folder / "weights.safetensors").mkdir()  # reported when it is written
    check_run_folder(folder)
    check_run_folder(folder / "missing")


@pytest.mark.parametrize("kept", [STATUS_NAME, BEFORE_NAME, "recipe.json", "metrics.jsonl", "checkpoints"])
def test_a_run_folder_is_identified_by_any_of_its_files(kept: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", evaluated=30)
    fingerprint = Fingerprint(fixed={}, free={})
    CheckpointFolder(run / "checkpoints").save({}, Progress(step=1, epoch_step=1), fingerprint)
    (run / BEFORE_NAME).write_bytes((run / STATUS_NAME).read_bytes())
    for path in list(run.iterdir()):
        if path.is_dir() and path.name != kept:
            path.rename(run / "moved")
        elif path.is_file() and path.name != kept:
            path.write_bytes(CONTENT)
    check_run_folder(run)
    (run / kept).rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is not a run folder"):
        check_run_folder(run)


def test_training_and_submission_change_nothing_in_a_folder_of_another_program(
    tmp_path: Path, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = foreign(tmp_path / "results", "hardest.jpg", "curves.png")
    options = ["--data", str(digits), "--size", "32", "--global-batch", "64", "--out", str(folder)]
    with pytest.raises(UserError, match=r"contains curves\.png and 1 more, which training would overwrite"):
        run_recipe(parse(options), StopSignals())
    assert submit(["--", *options]) == 2
    assert "contains curves.png and 1 more" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == dict.fromkeys(
        ("hardest.jpg", "curves.png"), CONTENT
    )


def test_submission_replaces_only_its_own_script(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # without sbatch
    script = tmp_path / "run" / "slurm" / "train.sbatch"
    for size in ("64", "96"):
        submit(["--", "--out", str(tmp_path / "run"), "--size", size])
        assert f"--size {size}" in script.read_text()
    script.write_bytes(CONTENT)
    capsys.readouterr()
    assert submit(["--", "--out", str(tmp_path / "run")]) == 2
    assert "train.sbatch: exists and was not written by 'python -m launch.submit'" in capsys.readouterr().err
    assert script.read_bytes() == CONTENT


def test_the_target_of_a_link_is_not_used_as_lock_file(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(CONTENT)
    (tmp_path / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic links"), file_lock(tmp_path / ".lock", "run folder"):
        pass
    assert (tmp_path / "precious").read_bytes() == CONTENT


# -- outputs with a default name


def test_a_file_with_a_default_name_is_replaced_only_if_the_command_wrote_it(
    tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    for arguments, name in (
        (["report", str(run)], "report.html"),
        (["look", str(digits), "--size", "32", "--count", "2"], "batch.png"),
    ):
        for _ in range(2):  # the second call replaces the file of the first one
            assert pipeline(arguments) == 0
        Path(name).write_bytes(CONTENT)
        capsys.readouterr()
        assert pipeline(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: --out {name}: exists, and was not written by this command; move it away")
        assert Path(name).read_bytes() == CONTENT
        other = f"other{Path(name).suffix}"
        Path(other).write_bytes(CONTENT)
        assert pipeline([*arguments, "--out", other]) == 0  # the user has named this file
        assert Path(other).read_bytes() != CONTENT


def test_a_mark_is_searched_at_the_beginning_of_a_regular_file(tmp_path: Path) -> None:
    path = tmp_path / "bench.png"
    check_output(path, "--chart", default=path)
    os.mkfifo(path)
    check_output(path, "--chart", default=path)  # written in place
    path.unlink()
    path.write_bytes(b"x" * 100 + MARK.encode())
    check_output(path, "--chart", default=path)
    path.write_bytes(b"x" * 5000 + MARK.encode())
    with pytest.raises(OutputError, match="move it away"):
        check_output(path, "--chart", default=path)

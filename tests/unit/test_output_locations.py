"""Outputs that cannot be written are rejected before the work starts, with a one-line error and a remedy."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.cli import main as pipeline
from shards.files.output import OutputError, check_output_folder
from tests.support.users import NOBODY, as_user, needs_root, public_folder

SMALL = ("--", "--size", "32", "--global-batch", "2")
# Commands that write files: arguments, and the remedy that the error must contain.
COMMANDS = {
    "shard --out": (["shard", "{source}", "--out", "{ro}/new"], "specify a folder that you can write to with --out"),
    "shard without --out": (["shard", "{ro}/source"], "specify a folder that you can write to with --out"),
    "index": (["index", "{ro}/tars/train-00000.tar"], "pipeline shard"),
    "sample digits": (["sample", "digits", "{ro}/digits"], "specify another"),
    "sample photos": (["sample", "photos", "{ro}/photos"], "specify another"),
    "look": (["look", "{set}", "--size", "32", "--out", "{ro}/x.png"], "specify another file"),
    "bench --json": (["bench", "{set}", "--json", "{ro}/x.json", *SMALL], "specify another file"),
    "bench --chart": (["bench", "{set}", "--chart", "{ro}/x.png", *SMALL], "specify another file"),
    "tune --out": (["tune", "{set}", "--out", "{ro}/tuned.toml", *SMALL], "specify another file"),
}


@pytest.fixture(scope="module")
def folders(digits: Path) -> Iterator[dict[str, Path]]:
    """A folder that all users can read but only root can write, with a set, tars and a source."""
    with public_folder(mode=0o755) as folder:
        shutil.copytree(digits, folder / "set")
        (folder / "tars").mkdir()
        shutil.copy(min(digits.glob("train-*.tar")), folder / "tars" / "train-00000.tar")
        shutil.copytree(digits.parent / "images" / "val", folder / "source" / "train")
        subprocess.run(["chmod", "-R", "a+rX,go-w", folder], check=True)
        yield {"set": folder / "set", "source": folder / "source", "ro": folder}


@pytest.mark.parametrize("name", COMMANDS)
def test_an_output_that_cannot_be_written_is_rejected_before_the_work(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    needs_root()
    arguments, advice = COMMANDS[name]
    # None of these may be called. (The patches also apply in the process that `as_user` forks.)
    for work in (
        "shards.convert.convert.detect_layout", "shards.commands.index_tars.run_jobs",
        "shards.commands.samples._load_photos", "launch.tuning.command.tune", "launch.bench.run.bench",
        "pipeline.storage.remote.shard_set.open_set",
    ):  # fmt: skip
        monkeypatch.setattr(work, _must_not_start)

    def run() -> tuple[int, str]:
        import io

        sys.stderr = io.StringIO()
        status = pipeline([text.format(**folders) for text in arguments])
        return status, sys.stderr.getvalue()

    result = as_user(NOBODY, run)
    assert isinstance(result, tuple), result
    status, output = result
    assert status in (1, 2)
    (line,) = [line for line in output.splitlines() if not line.startswith("note: HOME=")]
    assert line.startswith("error: ")
    assert advice in output


def _must_not_start(*_: object, **__: object) -> None:
    raise AssertionError("the work was started")


def test_a_missing_output_folder_is_checked_through_its_nearest_existing_parent(tmp_path: Path) -> None:
    check_output_folder(tmp_path / "a" / "b", "--out", "specify another")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"--out .*/file/b: .*/file is not a folder; specify another"):
        check_output_folder(tmp_path / "file" / "b", "--out", "specify another")

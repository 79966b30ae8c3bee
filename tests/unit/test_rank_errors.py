"""Errors of ranks, printed or passed to torch's launcher (launch/machine/rank_errors.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from launch.machine import rank_errors
from launch.machine.rank_errors import report_unexpected, report_user_error
from shards.errors import UserError

ERROR = UserError("set: missing;\ncreate it")
LINE = "error: set: missing;\\ncreate it"


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Return a list with an entry for every wait for the launcher."""
    found: list[bool] = []
    monkeypatch.setattr(rank_errors, "wait_for_end", lambda: found.append(True))
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_ERROR_FILE", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    return found


@pytest.mark.parametrize("rank", [0, 1])
def test_only_rank_0_prints_at_once(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], waits: list[bool], rank: int
) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    report_user_error(ERROR)
    assert capfd.readouterr().err == f"{'rank 1: ' if rank else ''}{LINE}\n"
    assert len(waits) == rank


def test_torch_prints_the_line_of_the_error_file(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    report_user_error(ERROR)
    assert capfd.readouterr().err == ""
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(file))
    assert f"  traceback : {LINE}\n" in str(ChildFailedError("train", {0: failure}))


@pytest.mark.parametrize("why", ["a restart follows", "the file cannot be written"])
def test_an_error_that_the_launcher_would_not_print_is_printed(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path, why: str
) -> None:
    writable = why == "a restart follows"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json" if writable else tmp_path))
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3" if writable else "0")
    report_user_error(ERROR)
    assert capfd.readouterr().err == f"{LINE}\n"


def test_an_unexpected_error_keeps_its_traceback_and_is_named_in_the_summary(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path, waits: list[bool]
) -> None:
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    monkeypatch.setenv("WORLD_SIZE", "2")
    report_unexpected(RuntimeError("broken"), lambda: False)
    assert capfd.readouterr().err == "RuntimeError: broken\n"
    assert "RuntimeError: broken" in file.read_text()
    assert len(waits) == 1

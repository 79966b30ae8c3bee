"""RUN/status (launch/run/status.py) is written even on a full disk, and reading it never raises."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launch.run.status import STATUS_NAME, read_status, write_status
from tests.support.disks import fill, small_disk


def test_written_status_is_read(tmp_path: Path) -> None:
    assert write_status(tmp_path, "stalled", step=5, reason="r", nodes=["a"])
    assert read_status(tmp_path) == "stalled"
    assert [path.name for path in tmp_path.iterdir()] == [STATUS_NAME]


def test_status_is_written_on_a_full_disk(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        assert write_status(disk, "running", step=100, reason="a longer text than the next")
        fill(disk)
        assert write_status(disk, "failed", step=5)
        assert read_status(disk) == "failed"


def test_failed_write_of_the_status_does_not_raise(tmp_path: Path) -> None:
    (tmp_path / STATUS_NAME).mkdir()
    assert not write_status(tmp_path, "failed")
    assert not write_status(tmp_path / "missing", "failed")
    assert [path.name for path in tmp_path.iterdir()] == [STATUS_NAME]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"17",
        b"null",
        b"\xff",
        bytes(100),
        b"[" * 100_000,
        b'{"status": "fine", "step": 1, "reason": ""}',
        b'{"status": ["running"], "step": 1, "reason": ""}',
        b'{"status": "running", "step": "1", "reason": ""}',
    ],
)
def test_damaged_status_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / STATUS_NAME).write_bytes(content)
    assert read_status(tmp_path) is None


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_status_path_that_is_not_a_regular_file_is_none(tmp_path: Path, make) -> None:
    make(tmp_path / STATUS_NAME)
    assert read_status(tmp_path) is None

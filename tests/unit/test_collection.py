"""`pytest tests`, which `make test-all` runs, must enter every folder of tests."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]


def test_pytest_collects_every_folder_of_tests(pytestconfig: pytest.Config) -> None:
    """By default, pytest does not collect folders named `dist`."""
    folders = {path.parent.name for path in TESTS.rglob("test_*.py")}
    assert {"unit", "dist", "slurm", "fuzz"} <= folders
    patterns = pytestconfig.getini("norecursedirs")
    assert [name for name in folders if any(fnmatch(name, pattern) for pattern in patterns)] == []

"""`pytest tests` and `make test` must enter every folder of tests."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
RUN_BY_OTHERS = {
    "interpreted",  # tests/unit/test_kernels.py
    "gpu",  # benchmarks/gpu.py
}


def _folders() -> set[str]:
    return {path.relative_to(TESTS).parts[0] for path in TESTS.rglob("test_*.py")}


def test_pytest_collects_every_folder_of_tests(pytestconfig: pytest.Config) -> None:
    """By default, pytest does not collect folders named `dist`."""
    folders = _folders()
    assert {"unit", "dist", "slurm", "fuzz"} <= folders
    patterns = pytestconfig.getini("norecursedirs")
    assert [name for name in folders if any(fnmatch(name, pattern) for pattern in patterns)] == []


def test_the_makefile_runs_every_folder_of_tests() -> None:
    commands = re.findall(r"-m pytest (.*)", (TESTS.parent / "Makefile").read_text("utf-8"))
    run = {folder for command in commands for folder in re.findall(r"tests/(\w+)", command)}
    assert run == _folders() - RUN_BY_OTHERS

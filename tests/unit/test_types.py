"""Static types. mypy is a test because it takes a minute on one core, in which the other core can run other tests."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.launching import ROOT


@pytest.mark.timeout(900)
def test_mypy_finds_no_errors() -> None:
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

"""A rank that fails makes its test fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dist.forked import Launcher


def test_the_error_shows_the_output_of_the_failed_rank(launch: Launcher, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="no-such-option"):
        launch("tests.dist.engine_run", tmp_path / "out.pt", "--steps", 1, "--no-such-option", ranks=2)

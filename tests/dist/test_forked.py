"""A rank that fails fails its test."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dist.forked import Launcher


def test_a_rank_that_fails_is_an_error_with_its_message(launch: Launcher, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="no-such-option"):
        launch("tests.dist.engine_run", tmp_path / "out.pt", "--steps", 1, "--no-such-option", ranks=2)

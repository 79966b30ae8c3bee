"""A kernel family that fails on one rank is switched off on all ranks, so that results do not depend on the rank."""

from __future__ import annotations

import json
from pathlib import Path

from tests.dist.forked import Launcher


def test_all_ranks_switch_off_the_same_families(launch: Launcher, tmp_path: Path) -> None:
    stderr = launch("tests.dist.kernel_check_run", tmp_path, ranks=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["off"] == second["off"] == ["gate", "norm"]
    assert first["apart"] == second["apart"]
    assert [failure["reason"] for failure in first["apart"]["failed"]] == ["wrong on rank 0", "wrong on rank 1"]
    # On one node, the first rank runs the self-check for all.
    assert first["together"] == second["together"]
    assert [failure["family"] for failure in first["together"]["failed"]] == ["norm"]
    assert (first["comparisons"], second["comparisons"]) == (2, 1)
    # Rank 0 alone tells.
    warnings = [line for line in stderr.splitlines() if "differ from PyTorch" in line]
    assert sum("the gate kernels" in line for line in warnings) == 1
    assert sum("the norm kernels" in line for line in warnings) == 2

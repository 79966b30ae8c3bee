"""A kernel family that fails on one rank is switched off on all: results do not depend on the rank."""

from __future__ import annotations

import json
from pathlib import Path

from tests.dist.launching import free_port, python


def test_ranks_switch_off_the_same_families(tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port()))
    # Nodes do not share the cache in which a verdict is kept.
    done = python(tmp_path, *launcher, "tests/dist/kernel_check_run.py", tmp_path, XDG_CACHE_HOME="/dev/null")
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["off"] == second["off"] == ["gate", "norm"]
    assert first["apart"] == second["apart"]
    assert [failure["reason"] for failure in first["apart"]["failed"]] == ["wrong on rank 0", "wrong on rank 1"]
    # Of one node the first rank compares for all.
    assert first["together"] == second["together"]
    assert [failure["family"] for failure in first["together"]["failed"]] == ["norm"]
    assert (first["comparisons"], second["comparisons"]) == (2, 1)
    # Rank 0 alone tells.
    warnings = [line for line in done.stderr.splitlines() if "do not agree with torch" in line]
    assert sum("the gate kernels" in line for line in warnings) == 1
    assert sum("the norm kernels" in line for line in warnings) == 2

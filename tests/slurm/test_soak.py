"""A short soak (tests/soak): every invariant holds after some failures, and an error of the soak leaves no traces."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.conftest import need
from tests.soak.data import digits
from tests.soak.nodes import some_nodes
from tests.soak.reference import References
from tests.soak.round import run_round
from tests.soak.schedule import BY_NAME, PlannedFailure, RoundPlan
from tests.support.launching import ROOT, environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

NEEDED = ("ip", "tc", "nsenter", "unshare", "mkfs.ext4", "cc")


def soak(tmp_path: Path, *options: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.soak", "--folder", tmp_path / "soak", "--json", tmp_path / "soak.json"]
    return subprocess.run(
        [*map(str, command), *map(str, options)],
        cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True, check=False, timeout=1700,
    )  # fmt: skip


def test_no_invariant_is_violated_by_some_failures(tmp_path: Path) -> None:
    need(*NEEDED)
    kinds = ("kill rank", "short stop", "slow disk", "damaged checkpoint", "damaged shard", "node added", "requeue")
    done = soak(tmp_path, "--rounds", "2", "--failures", "6", "--epochs", "2", "--kinds", *kinds)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "soak.json").read_text())
    assert found["violations"] == []
    assert found["failures"] == sum(found["by_kind"][kind]["count"] for kind in found["by_kind"] if kind != "all")
    assert found["failures"] >= 8
    assert found["checked"]["epochs"] == 4
    total = found["checked"]["samples delivered exactly once"]
    assert total + found["checked"].get("damaged samples skipped exactly once", 0) == 4 * 960
    statistics = found["rounds_with_equal_batchnorm_statistics"]
    assert statistics["equal"] == statistics["required"]
    assert 0 < found["goodput"]["value"] < 1
    assert not list((tmp_path / "soak").glob("round-*"))  # evidence is kept for violations only


def test_an_error_of_the_soak_keeps_the_run_folder_and_restores_the_nodes(tmp_path: Path) -> None:
    need(*NEEDED)
    failures = (
        PlannedFailure(BY_NAME["clock step"], "step", 5, "clock"),
        PlannedFailure(BY_NAME["slow link"], "step", 1, ""),
    )
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if "slow link" in line:
            raise BrokenPipeError  # as `print` does if the program that reads the output has ended

    with some_nodes(2, tmp_path) as nodes:
        with pytest.raises(BrokenPipeError):
            run_round(
                RoundPlan(0, 2, False, 0, False, failures), nodes, References(tmp_path, nodes), data=digits(tmp_path),
                folder=tmp_path / "round-0", seed=0, epochs=2, pace=0.2, say=say,
            )  # fmt: skip
        assert any("clock step" in line for line in said)
        assert [node.clock.offset for node in nodes] == [0.0, 0.0]
        assert [list(node.local.iterdir()) for node in nodes] == [[], []]  # rank 0 had a local checkpoint
        assert [node.processes() for node in nodes] == [[], []]
    assert (tmp_path / "round-0" / "run" / "metrics.jsonl").is_file()
    assert not (tmp_path / "round-0" / "shared").exists()

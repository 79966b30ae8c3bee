"""A short soak (tests/soak): every invariant holds after some failures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.conftest import need
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
    assert 0 < found["goodput"]["value"] < 1
    assert not list((tmp_path / "soak").glob("round-*"))  # evidence is kept for violations only

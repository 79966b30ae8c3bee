"""No step makes the host wait for the device: two processes, with DDP and with ZeRO.

Its twin for one process is in tests/unit/test_overlap.py, and for GPUs in tests/gpu/test_overlap.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.dist.launching import ROOT, environment, free_port

AS_ON_GPUS = ("--precision", "bf16", "--sync-bn", "on", "--ema", "0.9")
ACCUMULATE = ("--micro-batch", "2")


def waits(tmp_path: Path, data: Path, *options: str, ranks: int) -> dict[str, int]:
    """Places at which two steps wait, and how often."""
    out = tmp_path / "waits.json"
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", str(free_port())]
    script = ["tests/dist/host_waits_run.py", out, tmp_path / "run", "--data", data, *options]
    done = subprocess.run(
        [sys.executable, *launcher, *map(str, script)],
        cwd=ROOT,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


@pytest.mark.parametrize(
    ("zero", "options"),
    [
        (0, AS_ON_GPUS),
        (1, AS_ON_GPUS),
        pytest.param(0, ACCUMULATE, marks=pytest.mark.slow),
        pytest.param(1, ACCUMULATE, marks=pytest.mark.slow),
        pytest.param(1, ("--clip-grad", "0"), marks=pytest.mark.slow),
        pytest.param(2, ACCUMULATE, marks=pytest.mark.slow),
    ],
)
def test_no_step_makes_the_host_wait(tmp_path: Path, digits: Path, zero: int, options: tuple[str, ...]) -> None:
    assert waits(tmp_path, digits, "--zero", str(zero), *options, ranks=2) == {}


@pytest.mark.slow
def test_where_deepspeed_takes_the_norm_its_waits_are_seen(tmp_path: Path, digits: Path) -> None:
    """As DeepSpeed does for an optimiser that cannot skip its update on the device: the norm, and clipping by it."""
    found = waits(tmp_path, digits, "--zero", "1", "--optimizer-form", "foreach", ranks=2)
    assert found
    assert all("deepspeed/runtime/" in place for place in found)

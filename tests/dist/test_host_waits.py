"""No step makes the host wait for the device, in two processes with DDP and ZeRO.

The tests for one process are in tests/unit/test_overlap.py, those for GPUs in tests/gpu/test_overlap.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.dist.forked import Launcher

AS_ON_GPUS = ("--precision", "bf16", "--sync-bn", "on", "--ema", "0.9")
ACCUMULATE = ("--micro-batch", "2")


@pytest.fixture
def waits(launch: Launcher, tmp_path: Path, digits: Path) -> Callable[..., dict[str, int]]:
    """Return a function that runs two steps on two ranks with options of launch/train.py and counts waits by stack."""

    def found(*options: object) -> dict[str, int]:
        out = tmp_path / "waits.json"
        launch("tests.dist.host_waits_run", out, tmp_path / "run", "--data", digits, *options, ranks=2)
        return json.loads(out.read_text())

    return found


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
def test_no_step_makes_the_host_wait(waits: Callable[..., dict[str, int]], zero: int, options: tuple[str, ...]) -> None:
    assert waits("--zero", zero, *options) == {}


@pytest.mark.slow
def test_waits_of_deepspeeds_gradient_norm_are_detected(waits: Callable[..., dict[str, int]]) -> None:
    """DeepSpeed reads the norm on the host, and clips, for an optimizer that cannot skip its update on the device."""
    found = waits("--zero", 1, "--optimizer-impl", "foreach")
    assert found
    assert all("deepspeed/runtime/" in stack for stack in found)

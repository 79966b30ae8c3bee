"""The training loop never waits for the device: CUDA's sync debug mode raises at every synchronization. `make gpu`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.launching import python
from tests.support.training_loop import training

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

STEPS = 10


@pytest.fixture
def checked() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_the_sync_debug_mode_raises(checked: None) -> None:
    with pytest.raises(RuntimeError, match="synchronizing"):
        torch.ones((), device="cuda").item()


@pytest.mark.parametrize("zero", [1, 2])
def test_no_step_with_zero_waits_for_the_device(tmp_path: Path, photos: Path, zero: int) -> None:
    """In a separate process, which DeepSpeed needs for its process group."""
    out = tmp_path / "waits.json"
    script = ("tests/dist/host_waits_run.py", out, tmp_path / "run", "--data", photos, "--zero", str(zero))
    done = python(tmp_path, *script, "--ema", "0.9")
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text()) == {}


@pytest.mark.parametrize("options", [(), ("--ema", "0.9"), ("--augment", "light"), ("--micro-batch", "16")])
def test_neither_loop_nor_loader_waits_for_the_device(tmp_path: Path, photos: Path, options: tuple[str, ...]) -> None:
    with training(photos, tmp_path / "run", *options, batch=32, device="cuda") as step:
        for _ in range(3):  # the first steps allocate memory and select kernels
            step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(STEPS):
                step()
        finally:
            torch.cuda.set_sync_debug_mode("default")

"""Slow ranks of trainings on a GPU: `make gpu`. Two ranks use one GPU, with gloo; see tests/dist/test_slow_ranks.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from launch.stragglers import gpu_speed
from launch.stragglers.collective_wait import CollectiveWait, collective
from launch.stragglers.gpu_speed import GpuSpeed
from tests.support.launching import LAUNCHER, free_port, lines, run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

OPTIONS = ("--recipe", "launch/recipes/digits.toml", "--size", "32", "--log-every", "5", "--stop-after", "60")


@pytest.mark.parametrize(
    "options",
    [("--zero", "0", "--sync-bn", "on"), ("--zero", "1", "--sync-bn", "off")],
    ids=["DDP, eager", "ZeRO 1, CUDA graphs"],
)
def test_a_rank_whose_loader_is_slow_is_named(tmp_path: Path, digits: Path, options: tuple[str, ...]) -> None:
    topology = ("--multi_gpu", "--num_processes", "2", "--main_process_port", str(free_port()))
    training = (*OPTIONS, "--data", digits, "--out", tmp_path / "run", *options)
    done = run(tmp_path, *LAUNCHER, *topology, "tests/dist/slow_rank_run.py", *training, SLOW_DATA="0.4")
    assert done.returncode == 0, done.stderr
    assert "warning: rank 1 on" in done.stderr
    last = lines(tmp_path / "run", "train")[-1]
    assert (last["slowest_rank"], last["cause"]) == (1, "data")
    assert last["communication"] > 0.2


def test_collectives_are_measured_without_waiting_for_the_device() -> None:
    device = torch.device("cuda", 0)
    waits = CollectiveWait(device, incomplete=True)
    values = torch.ones((4096, 4096), device=device)
    layer = torch.nn.Linear(64, 64, device=device)
    loss = layer(torch.ones(8, 64, device=device)).sum()
    values @ values
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            with waits.step():
                with waits.backward(loss):
                    loss.backward(retain_graph=True)
                    values @ values
                with collective():
                    values @ values
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert waits.seconds() > 0
    assert waits.idle_seconds() >= 0
    assert not waits._pending


def test_the_speed_of_a_gpu_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_speed, "PROBE_SECONDS", 0.0)
    speed = GpuSpeed(torch.device("cuda", 0))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            speed.measure()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert 0 < speed.take() < 100

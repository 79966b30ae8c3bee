"""Measurements of `pipeline doctor` on a GPU: `make gpu`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from launch.doctor.measure import BRIEF, measure
from launch.machine.world import World

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def test_a_gpu_is_measured_and_left_as_it_was(photos: Path) -> None:
    device = torch.device("cuda", 0)
    torch.cuda.manual_seed(7)
    torch.zeros(1, device=device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    reserved, generator = torch.cuda.memory_reserved(device), torch.cuda.get_rng_state(device)
    report = measure(World(0, 1, 0, 1, device), photos, cores=1, durations=BRIEF, phase=lambda name: None)
    (rank,) = report.ranks
    assert rank.errors == ()
    assert rank.matmul is not None
    assert rank.copy is not None
    assert 1e12 < rank.matmul < 1e17
    assert 1e10 < rank.copy < 1e14
    assert torch.equal(torch.cuda.get_rng_state(device), generator)
    # cuBLAS keeps a workspace, which the training uses too.
    assert torch.cuda.memory_reserved(device) - reserved < 256 << 20
    assert torch.cuda.max_memory_reserved(device) - reserved < 256 << 20

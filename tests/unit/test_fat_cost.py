"""Counted costs of the models agree with the paper."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fat
from tests.support.tiny_fat import PARAMETERS, TINY

ROOT = Path(__file__).resolve().parents[2]
# At 224 pixels: with the attention products; from the paper, without them.
GMAC = {"fat_b0": 0.754, "fat_b1": 1.243, "fat_b2": 2.131, "fat_b3": 4.632}
PAPER_GMAC = {"fat_b0": 0.7, "fat_b1": 1.2, "fat_b2": 2.0, "fat_b3": 4.4}


@pytest.mark.parametrize("name", fat.list_models())
def test_costs_agree_with_the_paper(name: str) -> None:
    with torch.device("meta"):
        cost = fat.count(fat.create_model(name))
    assert cost.parameters == PARAMETERS[name]
    assert cost.macs / 1e9 == pytest.approx(GMAC[name], rel=0.005)
    assert cost.conv_macs / 1e9 == pytest.approx(PAPER_GMAC[name], abs=0.05)


def test_counting_does_not_change_the_model() -> None:
    model = fat.FAT(TINY).eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    fat.count(model, 64)
    assert not model.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_activation_bytes_are_those_that_autograd_stores() -> None:
    """Compared with real memory, which also has a copy of each block's queries."""
    model = fat.FAT(TINY).train()
    images = torch.randn(2, 3, 96, 64)
    of_model = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(images)
    real = sum(t.untyped_storage().nbytes() for address, t in saved.items() if address not in of_model)
    assert output.requires_grad
    assert fat.count(model, (96, 64)).activation_bytes == pytest.approx(real / 2, rel=0.04)


def test_costs_grow_with_the_image_size() -> None:
    model = fat.FAT(TINY)
    small, large = fat.count(model, 64), fat.count(model, (128, 128))
    assert large.parameters == small.parameters
    assert large.conv_macs == pytest.approx(4 * small.conv_macs, rel=0.01)
    assert large.attention_macs == 16 * small.attention_macs
    assert large.activation_bytes > 4 * small.activation_bytes


def test_the_command_prints_the_table() -> None:
    command = [sys.executable, "-m", "fat.account.table"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120).stdout
    rows = {line.split()[0]: line for line in printed.splitlines()}
    for name in fat.list_models():
        assert f"{PARAMETERS[name]:,}" in rows[name]
        assert f"{GMAC[name]:.3f}" in rows[name]

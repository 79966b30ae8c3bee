"""Precision, gradients, drop path, reproducibility and activation checkpointing of the model."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.func import functional_call

import fat
from fat import kernels
from fat.activation_checkpointing import checkpoint_block
from fat.blocks import Block
from fat.layers import DropPath, GroupNorm1, _group_norm, norm_rows
from tests.support.tiny_fat import TINY, images, relative_error, set_running_stats

Norm = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]


def test_both_norms_agree_and_keep_the_memory_format() -> None:
    """The implementation for CUDA, which runs on any device, against PyTorch's GroupNorm."""
    x = images(3, (5, 7), 8).double().contiguous(memory_format=torch.channels_last)
    weight, bias = torch.rand(8).double(), torch.rand(8).double()
    found = norm_rows(x, weight, bias, 1e-5)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, _group_norm(x, weight, bias, 1e-5), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", [_group_norm, norm_rows])
def test_norms_compute_in_fp32_under_autocast(norm: Norm, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a bf16 feature map with a mean of many standard deviations, for which bf16 sums would be wrong."""
    monkeypatch.setattr("fat.layers._group_norm", norm)
    x = (images(2, (32, 32), 8) + 100).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = GroupNorm1(8)(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.nn.functional.group_norm(x.float(), 1), rtol=1e-4, atol=1e-4)


def check_bf16(name: str) -> None:
    torch.manual_seed(0)
    model = set_running_stats(fat.create_model(name))
    exact = copy.deepcopy(model).double()
    batch = images(2, (96, 96))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = model(batch)
    with torch.no_grad():
        assert relative_error(found, exact(batch.double())) < 0.02


def test_bf16_autocast_within_two_percent_of_fp64() -> None:
    check_bf16("fat_b0")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fat_b1", "fat_b2", "fat_b3"])
def test_bf16_autocast_within_two_percent_of_fp64_in_every_variant(name: str) -> None:
    check_bf16(name)


@pytest.mark.parametrize("every_element", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("stride", "window"), [(1, 1), (1, 2), (2, 2)])
def test_gradients_of_a_block_by_finite_differences(stride: int, window: int, every_element: bool) -> None:
    """Along a random direction, or element by element."""
    torch.manual_seed(0)
    block = Block(4, 2, 3, window, out_dim=4 * stride, stride=stride, ffn_ratio=2, ffn_kernel=3).double().train()
    names = [name for name, _ in block.named_parameters()]
    x = torch.randn(2, 4, 4, 5, dtype=torch.float64, requires_grad=True)

    def run(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = functional_call(block, dict(zip(names, parameters, strict=True)), (x,))
        return result

    assert torch.autograd.gradcheck(run, (x, *block.parameters()), atol=1e-6, fast_mode=not every_element)


def test_drop_path_is_unbiased() -> None:
    torch.manual_seed(0)
    drop, samples = 0.3, 100_000
    branch = torch.ones(samples, 1, 1, 1, dtype=torch.bfloat16)
    out = DropPath(drop).train()(torch.full_like(branch, 2, dtype=torch.float32), branch)
    kept = torch.tensor(2 + 1 / (1 - drop))
    assert set(out.unique().tolist()) == {2.0, float(kept)}  # samples are dropped as a whole, with an fp32 factor
    five_sigma = 5 * (drop / (1 - drop) / samples) ** 0.5
    assert abs(out.mean().item() - 3) < five_sigma


def test_drop_path_rises_linearly_and_is_only_active_in_training() -> None:
    model = fat.create_model("fat_b0", drop_path=0.22)
    rates = [block.drop_path.drop for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.02 * i for i in range(12)])
    model.eval()
    assert torch.equal(model(images()), model(images()))


def test_the_same_seed_gives_the_same_gradients() -> None:
    def run(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        model = fat.create_model(TINY, drop_path=0.5).train()
        logits = model(images(8))
        logits.square().sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


@pytest.mark.parametrize("features_only", [False, True])
def test_activation_checkpointing_does_not_change_results(features_only: bool) -> None:
    """Gradients, BatchNorm's statistics and counters, and drop path are the same."""

    def run(checkpointing: bool) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        model = fat.create_model(TINY, drop_path=0.3, features_only=features_only).train()
        model.set_grad_checkpointing(checkpointing)
        output = model(images(4))
        outputs = output if isinstance(output, list) else [output]
        sum(m.square().sum() for m in outputs).backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, dict(model.named_buffers())

    for stored, recomputed in zip(run(False), run(True), strict=True):
        assert stored.keys() == recomputed.keys()
        for name, tensor in stored.items():
            torch.testing.assert_close(recomputed[name], tensor, msg=name, rtol=1e-5, atol=1e-5)


def test_recomputation_uses_the_kernels_mode_of_the_forward_pass() -> None:
    """On a GPU autograd recomputes in another thread, where the context variable has its default."""
    modes: list[kernels.Mode] = []

    def block(x: torch.Tensor) -> torch.Tensor:
        modes.append(kernels.mode())
        return x.square()

    with kernels.use("off"):
        output = checkpoint_block(block, torch.ones(2, requires_grad=True), nn.Identity())
    thread = threading.Thread(target=output.sum().backward)
    thread.start()
    thread.join()
    assert modes == ["off", "off"]


def test_activation_checkpointing_stores_less() -> None:
    def stored(checkpointing: bool) -> int:
        model = fat.FAT(TINY).train()
        model.set_grad_checkpointing(checkpointing)
        return fat.count(model, 64).activation_bytes

    assert stored(True) < stored(False) / 3

"""The counted roofline agrees with independent counts: estimates by hand, and the shapes of operations."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fat
from fat.account.roofline import Roofline, ceiling, roofline, trace_step
from tests.support.tiny_fat import TINY

# GB of a step of 256 images under bf16 autocast (eager, fused), estimated by hand.
ESTIMATED = {"fat_b0": (127, 29), "fat_b3": (449, 111)}


@functools.cache
def counted(name: str) -> Roofline:
    with torch.device("meta"):
        return roofline(fat.create_model(name))


VARIANTS = ["fat_b0", pytest.param("fat_b3", marks=pytest.mark.slow)]


@pytest.mark.parametrize("name", VARIANTS)
def test_bytes_agree_with_the_estimates(name: str) -> None:
    eager, fused = ESTIMATED[name]
    assert counted(name).eager_bytes * 256 / 1e9 == pytest.approx(eager, rel=0.25)
    assert counted(name).fused_bytes * 256 / 1e9 == pytest.approx(fused, rel=0.25)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_kernels_move_less_than_half_of_eager_and_less_than_twice_the_fused_bytes(name: str) -> None:
    found = counted(name)
    assert found.fused_bytes < found.bytes < 0.5 * found.eager_bytes
    assert found.bytes < 2 * found.fused_bytes


def test_fused_bytes_are_those_of_the_products_of_an_eager_run() -> None:
    """The former are counted from the shapes of layers, the latter from the tensors of operations."""
    model = fat.create_model("fat_b0")
    small, large = (trace_step(model, 224, torch.bfloat16, batch).product_bytes for batch in (2, 4))
    assert fat.count(model).fused_bytes(2) == pytest.approx((large - small) / 2, rel=0.05)


def test_flops_agree_with_torchs_counter() -> None:
    """Only in the forward pass: PyTorch's counter counts gradients of depthwise convolutions as those of dense ones.
    Not on a CPU, where products with padding are skipped."""
    model = fat.FAT(TINY).to("meta")
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(2, 3, 64, 64, device="meta"))
    assert fat.count(model, 64).training_flops / 3 == pytest.approx(counter.get_total_flops() / 2, rel=1e-6)


def test_the_ceiling_is_limited_by_the_slower_of_memory_and_arithmetic() -> None:
    assert ceiling(10, 5, bandwidth=100, arithmetic=1000) == 20
    assert ceiling(100, 5, bandwidth=100, arithmetic=1000) == 10

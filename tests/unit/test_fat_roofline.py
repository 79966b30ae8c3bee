"""The counted roofline against independent counts: FAT.md's estimates, and the operations' own shapes."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fat
from fat.account.roofline import Roofline, ceiling, roofline, trace_step
from tests.support.tiny_fat import TINY

# GB of a step of 256 images under bf16 autocast, estimated by hand before any of this was counted.
ESTIMATED = {"fat_b0": (127, 29), "fat_b3": (449, 111)}


@functools.cache
def counted(name: str) -> Roofline:
    with torch.device("meta"):
        return roofline(fat.create_model(name))


@pytest.mark.parametrize("name", ESTIMATED)
def test_bytes_agree_with_the_estimates(name: str) -> None:
    eager, fused = ESTIMATED[name]
    assert counted(name).eager_bytes * 256 / 1e9 == pytest.approx(eager, rel=0.25)
    assert counted(name).fused_bytes * 256 / 1e9 == pytest.approx(fused, rel=0.25)


@pytest.mark.parametrize("name", ESTIMATED)
def test_our_kernels_move_less_than_half_of_eager_and_less_than_twice_the_floor(name: str) -> None:
    found = counted(name)
    assert found.fused_bytes < found.bytes < 0.5 * found.eager_bytes
    assert found.bytes < 2 * found.fused_bytes


def test_fused_bytes_are_what_the_products_of_an_eager_run_pass() -> None:
    """Counted from layers' shapes in the one, from operations' tensors in the other."""
    model = fat.create_model("fat_b0")
    less, more = (trace_step(model, 224, torch.bfloat16, batch).product_bytes for batch in (2, 4))
    assert fat.count(model).fused_bytes(2) == pytest.approx((more - less) / 2, rel=0.05)


def test_flops_are_those_that_torch_counts() -> None:
    """Forward only: torch's counter takes the gradients of depthwise convolutions for those of full ones."""
    model = fat.FAT(TINY)
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(2, 3, 64, 64))
    assert fat.count(model, 64).training_flops / 3 == pytest.approx(counter.get_total_flops() / 2, rel=1e-6)


def test_the_ceiling_is_the_scarcer_of_memory_and_arithmetic() -> None:
    assert ceiling(10, 5, bandwidth=100, arithmetic=1000) == 20
    assert ceiling(100, 5, bandwidth=100, arithmetic=1000) == 10

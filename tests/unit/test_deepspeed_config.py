"""The configuration of DeepSpeed (launch/engine/accelerate.py)."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from launch.engine.accelerate import deepspeed_config


def config_of(zero: int, model: nn.Module, *, fused: bool = True) -> dict[str, Any]:
    return deepspeed_config(zero, model, fused=fused, bf16=False, clip_grad=5.0)


@pytest.mark.parametrize(
    ("zero", "fused", "caller_clips"), [(1, True, True), (2, True, True), (3, True, False), (1, False, False)]
)
def test_deepspeed_computes_the_norm_only_for_zero_3_and_unfused_optimizers(
    zero: int, fused: bool, caller_clips: bool
) -> None:
    config = config_of(zero, nn.Linear(3, 4), fused=fused)
    assert config["zero_optimization"].get("compute_grad_norm", True) is not caller_clips
    assert config["gradient_clipping"] == (0.0 if caller_clips else 5.0)


@pytest.mark.parametrize(("width", "expected"), [(3, 12), (30_000_000, 50_000_000)])
def test_reduction_bucket_is_no_larger_than_the_gradients(width: int, expected: int) -> None:
    model = nn.Sequential(nn.Linear(width, 4, bias=False, device="meta"), nn.Linear(4, 9, device="meta"))
    model[1].requires_grad_(False)
    assert config_of(1, model)["zero_optimization"]["reduce_bucket_size"] == expected

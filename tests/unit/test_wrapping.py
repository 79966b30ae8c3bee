"""What DeepSpeed is told (launch/engine/accelerate.py)."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from launch.engine.accelerate import _adapt_to_model, _leave_norm_to_caller
from launch.machine.world import World

CPU = torch.device("cpu")


@pytest.mark.parametrize(("fields", "left"), [({"compute_grad_norm": None}, True), ({}, False)])
def test_a_deepspeed_that_cannot_leave_the_norm_to_us_keeps_it_with_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fields: dict[str, None], left: bool
) -> None:
    fake = SimpleNamespace(model_fields=fields)
    monkeypatch.setattr("deepspeed.runtime.zero.config.DeepSpeedZeroConfig", fake)
    config = {"zero_optimization": {"stage": 1}, "gradient_clipping": 5.0}
    for rank in range(2):
        _leave_norm_to_caller(config, World(rank, 2, rank, 2, CPU))
    assert ("compute_grad_norm" in config["zero_optimization"]) is left
    assert config["gradient_clipping"] == (0.0 if left else 5.0)
    assert capsys.readouterr().err.count("reads the gradient norm on the host at every step") == (0 if left else 1)


@pytest.mark.parametrize(("most", "expected"), [(10, 10), (50_000_000, 12)])
def test_the_reduction_buffer_is_no_larger_than_the_gradients(most: int, expected: int) -> None:
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 9))
    model[1].requires_grad_(False)
    config = {"zero_optimization": {"reduce_bucket_size": most}}
    _adapt_to_model(config, model)
    assert config["zero_optimization"]["reduce_bucket_size"] == expected

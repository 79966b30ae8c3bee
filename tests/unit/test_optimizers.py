"""Gradient clipping and optimizer update (launch/engine/optimizers.py) equal PyTorch's bit by bit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from launch.config.engine import OptimizerImpl
from launch.engine.optimizers import OPTIMIZERS, Updater, create_state, parameter_groups, skip_if_not_finite

STEPS = 5


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5))


def optimizer_of(model: nn.Module, impl: OptimizerImpl = "fused") -> torch.optim.Optimizer:
    spec = OPTIMIZERS["adamw"]
    optimizer = spec.build(parameter_groups(model, 0.05), (0.9, 0.999), 1e-8, impl)
    create_state(optimizer, list(model.parameters()), spec.moments)
    return optimizer


def set_gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    if step == 2:
        model[0].weight.grad[0] = math.nan


def reference_update(optimizer: torch.optim.Optimizer, model: nn.Module, max_norm: float) -> torch.Tensor:
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm or math.inf)
    if optimizer.defaults["fused"]:
        skip_if_not_finite(optimizer, norm)
        optimizer.step()
    elif norm.isfinite():
        optimizer.step()
    return norm


@pytest.mark.parametrize("impl", ["fused", "foreach"])
@pytest.mark.parametrize("max_norm", [0.0, 0.1, 1e3])
def test_update_equals_pytorch_bit_by_bit(max_norm: float, impl: OptimizerImpl) -> None:
    found, expected = network(), network()
    ours, theirs = optimizer_of(found, impl), optimizer_of(expected, impl)
    update = Updater(ours, list(found.parameters()))
    for step in range(STEPS):
        for model, optimizer in ((found, ours), (expected, theirs)):
            set_gradients(model, step)
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (step + 1)
        norm = update(max_norm)
        assert norm.equal(reference_update(theirs, expected, max_norm)) or step == 2
        assert norm.isfinite() == (step != 2)
        assert norm.dtype == torch.float32
        assert not norm.requires_grad
    for a, b in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)
        assert ours.state[a].keys() == theirs.state[b].keys()
        for name, value in theirs.state[b].items():
            assert torch.equal(ours.state[a][name], value), name


def test_created_state_equals_that_of_pytorch_s_first_step() -> None:
    model, theirs = network(), network()
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.0, fused=True)
    set_gradients(theirs, 0)
    optimizer.step()
    ours = optimizer_of(model)
    for a, b in zip(model.parameters(), theirs.parameters(), strict=True):
        found, expected = ours.state[a], optimizer.state[b]
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert (found[name].shape, found[name].dtype) == (value.shape, value.dtype)
            assert not found[name].any()


def test_fused_update_bypasses_optimizer_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    optimizer = optimizer_of(model)
    update = Updater(optimizer, list(model.parameters()))
    monkeypatch.setattr(optimizer, "step", lambda: pytest.fail("Optimizer.step was called"))
    set_gradients(model, 1)
    update(1.0)

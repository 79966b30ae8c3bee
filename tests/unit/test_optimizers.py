"""Gradient clipping and optimizer update (launch/optim/optimizers.py) equal PyTorch's bit by bit, and LAMB timm's."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from launch.config.engine import OptimizerImpl
from launch.config.optim import OptimConfig
from launch.optim.optimizers import (
    OPTIMIZERS,
    OptimizerSpec,
    Updater,
    create_state,
    parameter_groups,
    skip_if_not_finite,
)
from tests.support.vision_libraries import vision_libraries  # noqa: F401 - a fixture

STEPS = 5


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5))


ADAMW = OptimConfig()
# With --optimizer-impl fused, the options of each optimizer that PyTorch has; foreach calls PyTorch's own step.
TORCH = [
    ADAMW,
    OptimConfig(optimizer="sgd"),
    OptimConfig(optimizer="sgd", nesterov=True, weight_decay=1e-4),
    OptimConfig(optimizer="sgd", momentum=0.0),
]


def optimizer_of(
    model: nn.Module, optim: OptimConfig = ADAMW, impl: OptimizerImpl = "fused"
) -> tuple[torch.optim.Optimizer, OptimizerSpec]:
    spec = OPTIMIZERS[optim.optimizer]
    optimizer = spec.build(parameter_groups(model, optim), optim, impl)
    create_state(optimizer, list(model.parameters()), spec)
    return optimizer, spec


def set_gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    if step == 2:
        model[0].weight.grad[0] = math.nan


def reference_update(optimizer: torch.optim.Optimizer, model: nn.Module, max_norm: float) -> torch.Tensor:
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm or math.inf)
    if optimizer.defaults.get("fused"):
        skip_if_not_finite(optimizer, norm)
        optimizer.step()
    elif norm.isfinite():
        optimizer.step()
    return norm


@pytest.mark.parametrize("impl", ["fused", "foreach"])
@pytest.mark.parametrize("max_norm", [0.0, 0.1, 1e3])
@pytest.mark.parametrize("optim", TORCH, ids=lambda optim: f"{optim.optimizer} {optim.momentum} {optim.nesterov}")
def test_update_equals_pytorch_bit_by_bit(optim: OptimConfig, max_norm: float, impl: OptimizerImpl) -> None:
    found, expected = network(), network()
    (ours, spec), (theirs, _) = optimizer_of(found, optim, impl), optimizer_of(expected, optim, impl)
    for state in theirs.state.values() if optim.optimizer == "sgd" else ():
        state.clear()  # PyTorch creates its own in the first step
    update = Updater(ours, list(found.parameters()), spec)
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
        for name, value in theirs.state[b].items():
            assert value is None or torch.equal(ours.state[a][name], value), name


@pytest.mark.parametrize("max_norm", [0.0, 0.5])
@pytest.mark.usefixtures("vision_libraries")
def test_lamb_equals_timm(max_norm: float) -> None:
    from timm.optim import Lamb

    optim = OptimConfig(optimizer="lamb", weight_decay=0.02)
    found, expected = network(), network()
    ours, spec = optimizer_of(found, optim)
    theirs = Lamb(parameter_groups(expected, optim), betas=optim.betas, eps=optim.eps, max_grad_norm=None)
    update = Updater(ours, list(found.parameters()), spec)
    for step in range(STEPS):
        for model, optimizer in ((found, ours), (expected, theirs)):
            set_gradients(model, step)
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (step + 1)
        before = [value.clone() for state in ours.state.values() for value in state.values()]
        update(max_norm)
        if step == 2:  # timm has no protection against gradients that are not finite
            after = [value for state in ours.state.values() for value in state.values()]
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        else:
            reference_update(theirs, expected, max_norm)
        for a, b in zip(found.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_created_state_equals_that_of_pytorch_s_first_step() -> None:
    model, theirs = network(), network()
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.0, fused=True)
    set_gradients(theirs, 0)
    optimizer.step()
    ours, _ = optimizer_of(model)
    for a, b in zip(model.parameters(), theirs.parameters(), strict=True):
        found, expected = ours.state[a], optimizer.state[b]
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert (found[name].shape, found[name].dtype) == (value.shape, value.dtype)
            assert not found[name].any()


@pytest.mark.parametrize("optim", [*TORCH, OptimConfig(optimizer="lamb")], ids=lambda optim: optim.optimizer)
def test_fused_update_bypasses_optimizer_step(optim: OptimConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    optimizer, spec = optimizer_of(model, optim)
    update = Updater(optimizer, list(model.parameters()), spec)
    monkeypatch.setattr(optimizer, "step", lambda: pytest.fail("Optimizer.step was called"))
    set_gradients(model, 1)
    update(1.0)

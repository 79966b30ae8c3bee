"""Clipping and update by whole lists (launch/engine/optimizers.py) equal torch's own, bit by bit."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from launch.config.engine import OptimizerImpl
from launch.engine.optimizers import OPTIMIZERS, Updater, parameter_groups, skip_if_not_finite

STEPS = 5


def network(*, unused: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5))
    if unused:
        model.register_parameter("unused", nn.Parameter(torch.zeros(3)))
    return model


def optimizer_of(model: nn.Module, form: OptimizerImpl = "fused") -> torch.optim.Optimizer:
    return OPTIMIZERS["adamw"].build(parameter_groups(model, 0.05), (0.9, 0.999), 1e-8, form)


def give_gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for name, parameter in model.named_parameters():
        if name != "unused":
            parameter.grad = torch.randn(parameter.shape, generator=generator)
    if step == 2:
        model[0].weight.grad[0] = math.nan


def torch_s_own(optimizer: torch.optim.Optimizer, model: nn.Module, max_norm: float) -> torch.Tensor:
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm or math.inf)
    if optimizer.defaults["fused"]:
        skip_if_not_finite(optimizer, norm)
        optimizer.step()
    elif norm.isfinite():
        optimizer.step()
    return norm


@pytest.mark.parametrize("unused", [False, True])
@pytest.mark.parametrize("form", ["fused", "foreach"])
@pytest.mark.parametrize("max_norm", [0.0, 0.1, 1e3])
def test_it_is_torch_s_own_update(max_norm: float, form: OptimizerImpl, unused: bool) -> None:
    found, expected = network(unused=unused), network(unused=unused)
    ours, theirs = optimizer_of(found, form), optimizer_of(expected, form)
    update = Updater(ours, list(found.parameters()))
    for step in range(STEPS):
        for model, optimizer in ((found, ours), (expected, theirs)):
            give_gradients(model, step)
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (step + 1)
        norm = update(max_norm)
        assert norm.equal(torch_s_own(theirs, expected, max_norm)) or step == 2
        assert norm.isfinite() == (step != 2)
        assert norm.dtype == torch.float32
        assert not norm.requires_grad
    for a, b in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)
        assert ours.state[a].keys() == theirs.state[b].keys()
        for name, value in theirs.state[b].items():
            assert torch.equal(ours.state[a][name], value), name


def test_after_a_checkpoint_was_loaded_it_works_on_what_was_loaded() -> None:
    model = network()
    optimizer = optimizer_of(model)
    update = Updater(optimizer, list(model.parameters()))
    for step in (0, 1):
        give_gradients(model, step)
        update(1.0)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    give_gradients(model, 3)
    update(1.0)
    for parameter in model.parameters():
        assert optimizer.state[parameter]["step"] == 3


def test_fused_updates_go_by_whole_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    optimizer = optimizer_of(model)
    update = Updater(optimizer, list(model.parameters()))
    give_gradients(model, 0)
    update(1.0)  # makes the state
    monkeypatch.setattr(optimizer, "step", lambda: pytest.fail("torch's own loop was used"))
    give_gradients(model, 1)
    update(1.0)


def test_an_optimiser_of_another_library_is_left_alone() -> None:
    """DeepSpeed's, for one, has no defaults."""
    assert not Updater(object(), [torch.ones(2, requires_grad=True)])._direct  # type: ignore[arg-type]

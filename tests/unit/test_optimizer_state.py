"""The EMA of the weights in `OptimizerState` (launch/optim/zero_state.py)."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from launch.machine.world import World
from launch.optim.optimizers import OPTIMIZERS
from launch.optim.zero_state import OptimizerState, average_decay

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


def made(decay: float, *, seed: int = 0) -> tuple[nn.Sequential, OptimizerState]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    return model, OptimizerState(0, model, optimizer, ALONE, spec=OPTIMIZERS["adamw"], decay=decay)


def test_ema_is_the_exponential_average_of_weights_and_statistics() -> None:
    model, optimizer_state = made(decay=0.75)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for step in range(100, 105):  # late enough for the full decay
        for value in (*model.parameters(), model[1].running_mean, model[1].running_var):
            value.data.add_(step + 1.0)
        optimizer_state.update_average(step)
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                expected[name] = 0.75 * expected[name] + 0.25 * value
    state = optimizer_state.state_dict()
    live = {name: value.clone() for name, value in model.state_dict().items()}
    for name, value in expected.items():
        if value.is_floating_point():
            torch.testing.assert_close(state[f"ema/{name}"], value)
    with optimizer_state.averaged():
        for name, value in expected.items():
            if value.is_floating_point():
                torch.testing.assert_close(model.state_dict()[name], value)
    assert all(torch.equal(live[name], value) for name, value in model.state_dict().items())


def test_interrupted_evaluation_of_the_ema_restores_the_weights() -> None:
    model, optimizer_state = made(decay=0.9)
    for value in (*model.parameters(), model[1].running_mean, model[1].running_var):
        value.data.add_(1.0)
    optimizer_state.update_average(0)
    before = {name: value.clone() for name, value in optimizer_state.state_dict().items()}
    with contextlib.suppress(KeyboardInterrupt), optimizer_state.averaged():
        assert torch.equal(model[0].weight, before["ema/0.weight"])
        raise KeyboardInterrupt
    assert all(torch.equal(before[name], value) for name, value in optimizer_state.state_dict().items())
    assert torch.equal(model[1].running_mean, before["model/1.running_mean"])


def test_non_finite_statistics_do_not_enter_the_ema() -> None:
    model, optimizer_state = made(decay=0.9)
    model[1].running_mean.fill_(float("nan"))
    optimizer_state.update_average(step=0)
    assert all(value.isfinite().all() for value in optimizer_state.averaged_statistics)


def test_ema_starts_from_the_weights_of_a_state_without_ema() -> None:
    trained, plain = made(decay=0.0, seed=1)
    trained[1].running_mean.fill_(5.0)
    _, optimizer_state = made(decay=0.9, seed=0)
    optimizer_state.load_state_dict(plain.state_dict(), steps=3)
    state = optimizer_state.state_dict()
    for name, value in trained.state_dict().items():
        if value.is_floating_point():
            assert torch.equal(state[f"ema/{name}"], value), name


@pytest.mark.parametrize(
    ("decay", "updates", "expected"),
    [(0.9999, 1, 2 / 11), (0.9999, 32, 33 / 42), (0.9, 79, 80 / 89), (0.9, 80, 0.9), (0.5, 10**6, 0.5), (0.1, 1, 0.1)],
)
def test_ema_decay_is_smaller_in_the_first_updates(decay: float, updates: int, expected: float) -> None:
    assert average_decay(decay, updates) == pytest.approx(expected, rel=1e-12)


def test_ema_of_a_short_run_contains_little_of_the_initial_weights() -> None:
    model, optimizer_state = made(decay=0.9999)
    start = {name: value.clone() for name, value in model.named_parameters()}
    for step in range(10):
        for value in model.parameters():
            value.data.fill_(2.0)
        optimizer_state.update_average(step)
    for name, value in start.items():
        left = (optimizer_state.state_dict()[f"ema/{name}"] - 2) / (value - 2)
        assert left.abs().max() < 0.001


def test_parameters_that_are_not_trained_are_saved_and_loaded_without_moments() -> None:
    def frozen(seed: int) -> tuple[nn.Sequential, OptimizerState]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
        model[0].requires_grad_(False)
        optimizer = torch.optim.AdamW(filter(lambda p: p.requires_grad, model.parameters()), fused=True)
        return model, OptimizerState(0, model, optimizer, ALONE, spec=OPTIMIZERS["adamw"], decay=0.9)

    (source, saving), (target, loading) = frozen(1), frozen(2)
    state = saving.state_dict()
    assert {key for key in state if key.endswith("/0.weight")} == {"model/0.weight"}
    assert {key for key in state if key.endswith("/2.weight")} == {
        f"{kind}/2.weight" for kind in ("model", "exp_avg", "exp_avg_sq", "ema")
    }
    loading.load_state_dict(state, steps=1)
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value), name

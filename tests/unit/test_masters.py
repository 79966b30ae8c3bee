"""The moving average (launch/masters.py): what it is, and that one bad step does not spoil it."""

from __future__ import annotations

import torch
from torch import nn

from launch.masters import Masters
from launch.world import World

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


def made(decay: float) -> tuple[nn.Sequential, Masters]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    return model, Masters(0, model, optimizer, ALONE, moments=("exp_avg", "exp_avg_sq"), decay=decay)


def test_the_average_is_the_exponential_one_of_weights_and_statistics() -> None:
    model, masters = made(decay=0.75)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for step in range(5):
        for value in (*model.parameters(), model[1].running_mean, model[1].running_var):
            value.data.add_(step + 1.0)
        masters.update_average()
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                expected[name] = 0.75 * expected[name] + 0.25 * value
    state = masters.state_dict()
    live = {name: value.clone() for name, value in model.state_dict().items()}
    for name, value in expected.items():
        if value.is_floating_point():
            torch.testing.assert_close(state[f"ema/{name}"], value)
    with masters.averaged():
        for name, value in expected.items():
            if value.is_floating_point():
                torch.testing.assert_close(model.state_dict()[name], value)
    assert all(torch.equal(live[name], value) for name, value in model.state_dict().items())


def test_statistics_that_are_not_finite_do_not_enter_the_average() -> None:
    model, masters = made(decay=0.9)
    model[1].running_mean.fill_(float("nan"))
    masters.update_average()
    assert all(value.isfinite().all() for value in masters.averaged_statistics)


def test_a_state_without_an_average_starts_one_from_its_weights() -> None:
    _, plain = made(decay=0.0)
    model, masters = made(decay=0.9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    masters.load_state_dict(plain.state_dict(), steps=3)
    state = masters.state_dict()
    for name, parameter in model.named_parameters():
        assert torch.equal(state[f"ema/{name}"], parameter)

"""Recalibration of BatchNorm: the running statistics become averages over batches, for the weights and for the EMA."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import fat
from launch.config.command_line import parse
from launch.engine.engine import Engine
from launch.engine.input_shapes import InputShape
from launch.machine.world import World
from pipeline.batch import Batch
from tests.support.batches import SIZE, random_batch
from tests.support.tiny_fat import TINY

ROWS = 6
BATCHES = [random_batch(100 + number, range(ROWS)) for number in range(5)]


def trained(*options: str, drop_path: float = 0.3) -> Engine:
    torch.manual_seed(0)
    model = fat.create_model(replace(TINY, drop_path=drop_path))
    world = World(0, 1, 0, 1, torch.device("cpu"))
    engine = Engine(model, parse([*options]), world, shapes=[InputShape(ROWS, SIZE, 1)])
    for step in range(3):
        engine.step([random_batch(step, range(ROWS))], step=step, lr=1e-2)
    return engine


def buffers(engine: Engine, *, average: bool = False) -> dict[str, Tensor]:
    kind, names = ("ema" if average else "model"), dict(engine.model.named_buffers())
    state = {name.removeprefix(f"{kind}/"): value.clone() for name, value in engine.state_dict().items()}
    return {name: state[name] for name in names if "running" in name}


def test_statistics_equal_those_of_pytorch_without_drop_path() -> None:
    engine = trained()
    reference = copy.deepcopy(engine.model)
    for module in reference.modules():
        if isinstance(module, fat.layers.DropPath):
            module.drop = 0.0
    update_bn([batch.images for batch in BATCHES], reference)
    engine.recalibrate_batch_norm(BATCHES)
    for name, buffer in reference.named_buffers():
        torch.testing.assert_close(engine.model.get_buffer(name), buffer, rtol=1e-4, atol=1e-6)


def test_statistics_depend_on_nothing_but_weights_and_batches() -> None:
    """Neither on earlier statistics, which may not be finite, nor on random numbers."""
    engine = trained()
    engine.recalibrate_batch_norm(BATCHES)
    expected = buffers(engine)
    for norm in engine.statistics():
        norm.fill_(torch.nan)
    torch.manual_seed(7)
    engine.recalibrate_batch_norm(BATCHES)
    for name, value in buffers(engine).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7)


def test_weights_and_ema_have_their_own_statistics() -> None:
    engine = trained("--ema", "0.9")
    before = {average: buffers(engine, average=average) for average in (False, True)}
    engine.recalibrate_batch_norm(BATCHES, average=True)
    assert_same(buffers(engine), before[False])
    ema = buffers(engine, average=True)
    engine.recalibrate_batch_norm(BATCHES)
    assert_same(buffers(engine, average=True), ema)
    weights = {name: value for name, value in engine.state_dict().items() if name.startswith("ema/")}
    alone = trained()  # whose weights are then those of the EMA
    with torch.no_grad():
        for name, parameter in alone.model.named_parameters():
            parameter.copy_(weights[f"ema/{name}"])
    alone.recalibrate_batch_norm(BATCHES)
    assert_same(buffers(alone), ema)
    assert any(not torch.equal(value, ema[name]) for name, value in buffers(engine).items())


@pytest.mark.parametrize("option", ["--freeze-bn", "--freeze-backbone"])
def test_frozen_statistics_do_not_change(option: str) -> None:
    engine = trained(option)
    before = buffers(engine)
    engine.recalibrate_batch_norm(BATCHES)
    assert_same(buffers(engine), before)


def test_training_continues_as_before_apart_from_the_statistics() -> None:
    """Momentum, modes, weights, optimizer state and random numbers do not change."""
    plain, recalibrated = trained("--ema", "0.9"), trained("--ema", "0.9")
    for average in (False, True):
        recalibrated.recalibrate_batch_norm(BATCHES, average=average)
    after = [engine.step([random_batch(9, range(ROWS))], step=9, lr=1e-2) for engine in (plain, recalibrated)]
    assert torch.equal(after[0].loss, after[1].loss)
    states = [engine.state_dict() for engine in (plain, recalibrated)]
    for name, value in states[0].items():
        if "running" not in name and "tracked" not in name:
            torch.testing.assert_close(states[1][name], value, rtol=1e-5, atol=1e-7)
    momenta = {norm.momentum for norm in recalibrated.model.modules() if isinstance(norm, nn.BatchNorm2d)}
    assert momenta == {0.1}


def test_an_error_in_the_batches_restores_the_statistics() -> None:
    engine = trained()
    before = buffers(engine)

    def failing() -> Iterator[Batch]:
        yield BATCHES[0]
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        engine.recalibrate_batch_norm(failing())
    assert_same(buffers(engine), before)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name

"""Batches of several shapes in one engine: drop-path rates, and compilation before the first step.

tests/unit/test_cuda_graphs.py tests CUDA graphs of several shapes, tests/dist/test_engine.py several ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fat
from fat.layers import DropPath
from launch.config.command_line import parse
from launch.engine.engine import Engine
from launch.engine.input_shapes import DropPathRates, InputShape
from launch.machine.world import World
from pipeline.batch import Batch
from tests.support.batches import SIZE, random_batch
from tests.support.tiny_fat import TINY
from tests.support.vision_libraries import vision_libraries  # noqa: F401 - a fixture

CPU = torch.device("cpu")
SHAPES = [InputShape(4, SIZE, 2, 0.25), InputShape(2, 64, 3)]


def tiny_fat(drop_path: float = 0.3) -> nn.Module:
    return fat.create_model(replace(TINY, drop_path=drop_path))


def engine_of(
    *options: str, shapes: Sequence[InputShape] = SHAPES, create: Callable[[], nn.Module] = tiny_fat
) -> Engine:
    torch.manual_seed(0)
    model = create()
    return Engine(model, parse([*options]), World(0, 1, 0, 1, CPU), shapes=shapes)


def step(engine: Engine, shape: InputShape, *, number: int = 0) -> float:
    batches = [batch_of(engine, micro, shape) for micro in range(shape.accumulation)]
    return engine.step(batches, step=number, lr=1e-3).loss.item()


def batch_of(engine: Engine, number: int, shape: InputShape) -> Batch:
    batch = random_batch(number, range(shape.rows), size=shape.size)
    return replace(batch, images=batch.images.to(engine.input_dtype))


def rates(model: nn.Module) -> list[float]:
    return [module.drop for module in model.modules() if isinstance(module, DropPath)]


def test_drop_path_rates_are_those_of_the_batch_s_shape() -> None:
    engine = engine_of()
    unscaled = rates(engine.model)
    assert unscaled[-1] == 0.3
    for shape in (*SHAPES, *SHAPES):
        step(engine, shape)
        assert rates(engine.model) == [rate * shape.drop_path_scale for rate in unscaled]


def test_a_factor_of_1_changes_no_result() -> None:
    plain = [replace(shape, drop_path_scale=1.0) for shape in SHAPES]
    scaled, unscaled = engine_of(), engine_of(shapes=plain)
    assert step(scaled, SHAPES[1]) == step(unscaled, plain[1])
    assert step(scaled, SHAPES[0], number=1) != step(unscaled, plain[0], number=1)
    low = engine_of(shapes=plain, create=lambda: tiny_fat(0.25 * 0.3))
    assert step(engine_of(), SHAPES[0]) == pytest.approx(step(low, plain[0]))


@pytest.mark.usefixtures("vision_libraries")
def test_drop_path_of_other_libraries_is_scaled() -> None:
    import timm
    import torchvision

    layers = [timm.layers.DropPath(0.2), torchvision.ops.StochasticDepth(0.4, "row")]
    DropPathRates(nn.Sequential(*layers), SHAPES).scale_for(4, SIZE)
    assert (layers[0].drop_prob, layers[1].p) == (0.05, 0.1)


def test_a_model_without_drop_path_is_reported_only_if_factors_are_set() -> None:
    def small() -> nn.Module:
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10))

    (note,) = engine_of(create=small).notes
    assert note == "note: the model has no drop-path layers, so only augmentation is weaker at small image sizes"
    assert engine_of(create=small, shapes=[InputShape(4, SIZE, 1)]).notes == []


# -- torch.compile -----------------------------------------------------------------------------------------------------


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Replace the compiler's code generation, which takes minutes, by the eager execution of its graphs.

    Return the list of compiled graphs: "forward" or "backward".
    """
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    made: list[str] = []

    def compiler(kind: str) -> Callable[..., Any]:
        def compiled(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Any:
            made.append(kind)
            return make_boxed_func(graph)

        return compiled

    backend = aot_autograd(fw_compiler=compiler("forward"), bw_compiler=compiler("backward"))
    original = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **kwargs: original(self, backend=backend, **kwargs))
    torch._dynamo.reset()
    yield made
    torch._dynamo.reset()


COMPILED = ("--compile", "default")


class Small(nn.Module):
    """A network with BatchNorm and drop path that is traced quickly."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8))
        self.drop_path, self.branch, self.head = DropPath(0.3), nn.Conv2d(8, 8, 1), nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.convs(images)
        return self.head(self.drop_path(x, self.branch(x)).mean(dim=(2, 3)))


@pytest.mark.parametrize("options", [(), ("--precision", "bf16")])
def test_every_shape_is_compiled_before_the_first_step(graphs: list[str], options: tuple[str, ...]) -> None:
    engine = engine_of(*COMPILED, *options, create=Small)
    assert graphs == ["forward", "backward"] * len(SHAPES)
    for number in range(4):
        step(engine, SHAPES[number % 2], number=number)
    engine.evaluate([batch_of(engine, 0, InputShape(3, SIZE, 1))])
    step(engine, SHAPES[0])
    assert len(graphs) == 2 * len(SHAPES)
    engine.close()


def test_compilation_changes_no_result(graphs: list[str]) -> None:
    eager, compiled = (engine_of(*options, "--ema", "0.9", create=Small) for options in ((), COMPILED))
    assert all(parameter.grad is None for parameter in compiled.model.parameters())
    for name, buffer in eager.model.named_buffers():
        assert torch.equal(buffer, compiled.model.get_buffer(name)), name
    for number in range(4):
        losses = [step(engine, SHAPES[number % 2], number=number) for engine in (eager, compiled)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_more_shapes_than_the_recompilation_limit_are_compiled(graphs: list[str]) -> None:
    shapes = [InputShape(2, 32 * number, 1) for number in range(1, 11)]
    engine = engine_of(*COMPILED, shapes=shapes, create=Small)
    step(engine, shapes[0])
    assert len(graphs) == 2 * len(shapes)

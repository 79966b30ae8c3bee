"""Training with CUDA graphs on a GPU: `make gpu`.

tests/unit/test_cuda_graphs.py tests the same with a CPU replacement for CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

import fat
from launch.config.command_line import parse
from launch.engine.cuda_graph_capture import CudaRecorder
from launch.engine.cuda_graphs import GraphedModel
from launch.engine.engine import Engine
from launch.engine.input_shapes import InputShape
from launch.machine.world import World
from tests.support.batches import CLASSES, random_batch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

ROWS, SIDE, STEPS = 8, 64, 6
LEAST_NORM = 1e-2  # gradients below it can be only rounding errors, such as those of biases before BatchNorm
# One block per stage, with B0's widths.
CONFIG = fat.FATConfig(
    num_classes=CLASSES, widths=(32, 80, 160, 256), depths=(1, 1, 1, 1), heads=(2, 5, 10, 16), drop_path=0.3
)


def fat_model() -> nn.Module:
    return fat.create_model(CONFIG)


def train(
    *options: str,
    accumulation: int = 1,
    create: Callable[[], nn.Module] = fat_model,
    shapes: Sequence[InputShape] = (),
) -> dict[str, Any]:
    """Train a few steps, with an evaluation in between and one at the end, and return the results.

    Step n has batches of shape number n of `shapes`, which are repeated.
    """
    shapes = shapes or [InputShape(ROWS, SIDE, accumulation)]
    recipe = parse(["--size", str(SIDE), "--zero", "0", *options])
    torch.manual_seed(0)
    world = World(0, 1, 0, 1, torch.device("cuda", 0))
    engine = Engine(create(), recipe, world, shapes=shapes)
    results, evaluations = [], []
    for step in range(STEPS):
        shape = shapes[step % len(shapes)]
        numbers = range(step * shape.accumulation, (step + 1) * shape.accumulation)
        batches = [random_batch(n, range(shape.rows), device="cuda", size=shape.size) for n in numbers]
        results.append(engine.step(batches, step=step, lr=1e-3))
        if step in (1, STEPS - 1):
            evaluations.append(engine.evaluate([random_batch(100, range(ROWS + 2), device="cuda", size=SIDE)]))
    return {
        "losses": torch.stack([result.loss for result in results]).tolist(),
        "norms": torch.stack([result.grad_norm for result in results]).tolist(),
        "evaluations": [evaluation["loss"] for evaluation in evaluations],
        "buffers": {name: buffer.double().cpu() for name, buffer in engine.model.named_buffers()},
        "compile": engine.resolved["compile"],
        "notes": engine.notes,
    }


def assert_close(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    assert found["losses"][0] == pytest.approx(expected["losses"][0], rel=tolerance / 10)
    for key in ("losses", "norms", "evaluations"):
        assert found[key] == pytest.approx(expected[key], rel=tolerance), key
    for name, buffer in expected["buffers"].items():
        if "batches" in name:
            assert torch.equal(found["buffers"][name], buffer), name
        else:
            torch.testing.assert_close(found["buffers"][name], buffer, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("options", "accumulation", "tolerance"),
    [
        (("--precision", "fp32"), 1, 1e-2),
        (("--precision", "bf16", "--ema", "0.9"), 1, 5e-2),
        (("--precision", "fp32", "--clip-grad", "0.1"), 3, 1e-2),
        (("--precision", "fp32", "--freeze-bn", "--kernels", "off"), 1, 1e-2),
    ],
)
def test_replayed_training_equals_eager_training(options: tuple[str, ...], accumulation: int, tolerance: float) -> None:
    """Up to the order of atomic additions, which differs from run to run."""
    replayed = train(*options, accumulation=accumulation)
    assert replayed["notes"] == []
    assert replayed["compile"] == "cudagraphs: forward and backward of 6 parts"
    assert_close(replayed, train("--compile", "off", *options, accumulation=accumulation), tolerance)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_replays_of_several_shapes_equal_eager_training(accumulation: int) -> None:
    shapes = [InputShape(2 * ROWS, SIDE // 2, 1, 0.5), InputShape(ROWS, SIDE, accumulation)]
    replayed = train("--precision", "fp32", "--ema", "0.9", shapes=shapes)
    assert replayed["notes"] == []
    assert replayed["compile"] == "cudagraphs: forward and backward of 6 parts"
    assert_close(replayed, train("--compile", "off", "--precision", "fp32", "--ema", "0.9", shapes=shapes), 1e-2)


def test_captured_gradients_are_eager_gradients_of_the_same_drop_path() -> None:
    """Several replays, each with another seed and other images."""
    torch.manual_seed(0)
    device = torch.device("cuda", 0)
    eager, replayed = (fat_model().to(device).train() for _ in range(2))
    replayed.load_state_dict(eager.state_dict())
    first = random_batch(0, range(ROWS), device="cuda", size=SIDE).images
    graphs = GraphedModel(replayed, CudaRecorder(device))
    graphs.warm_up(first, None)
    graphs.capture(first, None)
    for number in range(3):
        images = random_batch(number, range(ROWS), device="cuda", size=SIDE).images
        for model in (eager, replayed):
            torch.manual_seed(number)
            model(images).square().sum().backward()
        for (name, actual), expected in zip(replayed.named_parameters(), eager.parameters(), strict=True):
            error = (actual.grad - expected.grad).norm() / expected.grad.norm().clamp(min=LEAST_NORM)
            assert error < 1e-2, (name, float(error))
        for model in (eager, replayed):
            model.zero_grad(set_to_none=True)


class WaitsForTheDevice(nn.Module):
    """A model that synchronizes with the device in its forward pass, which a capture does not allow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, CLASSES, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.conv(images)
        return features.mean(dim=(2, 3)) * (1.0 if features.sum().item() < 1e9 else 0.5)


def test_a_model_that_cannot_be_captured_is_trained_eagerly_with_a_warning() -> None:
    failed = train("--precision", "fp32", create=WaitsForTheDevice)
    (note,) = failed["notes"]
    assert note.startswith("warning: CUDA graph capture failed (")
    assert "\n" not in note
    assert failed["compile"].startswith("off (capture failed")
    assert_close(failed, train("--precision", "fp32", "--compile", "off", create=WaitsForTheDevice), 1e-4)
    # The failed capture has no effect on the stream, the allocator and later captures.
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert train("--precision", "fp32")["notes"] == []


def test_a_replayed_step_does_not_wait_for_the_device() -> None:
    recipe = parse(["--size", str(SIDE), "--zero", "0"])
    world = World(0, 1, 0, 1, torch.device("cuda", 0))
    engine = Engine(fat_model(), recipe, world, shapes=[InputShape(ROWS, SIDE, 2)])
    batches = [random_batch(n, range(ROWS), device="cuda", size=SIDE) for n in range(2)]
    engine.step(batches, step=0, lr=1e-3)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.step(batches, step=1, lr=1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")

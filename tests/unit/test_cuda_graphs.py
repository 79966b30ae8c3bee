"""Training with captured graphs equals eager training bit by bit.

The tests replace CUDA by a recorder that runs the recorded function again at every replay and writes to static inputs,
outputs and gradients, like a CUDA graph. tests/gpu/test_training_step.py runs the same tests on a GPU.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fat
from launch.config.command_line import parse
from launch.config.errors import RecipeError
from launch.config.recipe import Recipe
from launch.engine import cuda_graph_capture
from launch.engine.cuda_graph_capture import CudaRecorder, Results, Work
from launch.engine.cuda_graphs import GraphedModel
from launch.engine.engine import Engine, seed_generators
from launch.engine.execution import Execution, graph_obstacle
from launch.engine.input_shapes import InputShape
from launch.machine.world import World
from tests.support.batches import CLASSES, SIZE, random_batch
from tests.support.recorders import FailsAt, ReplayOnCpu

CPU = torch.device("cpu")
ROWS = 4
CONFIG = fat.FATConfig(
    num_classes=CLASSES, widths=(16, 32, 48, 64), depths=(1, 2, 1, 1), heads=(2, 4, 6, 8), drop_path=0.3
)


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[ReplayOnCpu]:
    """Make CPUs capturable; return the list of all recorders that engines create."""
    made: list[ReplayOnCpu] = []

    def make(device: torch.device) -> ReplayOnCpu:
        made.append(ReplayOnCpu(device))
        return made[-1]

    monkeypatch.setitem(cuda_graph_capture.RECORDERS, "cpu", make)
    return made


def engine_of(*options: str, accumulation: int = 1, shapes: Sequence[InputShape] = ()) -> Engine:
    recipe = parse(["--size", str(SIZE), *options])
    torch.manual_seed(0)
    model = fat.create_model(CONFIG)
    shapes = shapes or [InputShape(ROWS, SIZE, accumulation)]
    return Engine(model, recipe, World(0, 1, 0, 1, CPU), shapes=shapes)


def train(
    engine: Engine, *, steps: int = 4, accumulation: int = 1, shapes: Sequence[InputShape] = ()
) -> dict[str, Any]:
    """Train on fixed batches; return losses, gradient norms, an evaluation in between, and the final state.

    Step n has batches of shape number n of `shapes`, which are repeated.
    """
    results, evaluations, shapes = [], [], shapes or [InputShape(ROWS, SIZE, accumulation)]
    for step in range(steps):
        shape = shapes[step % len(shapes)]
        numbers = range(step * shape.accumulation, (step + 1) * shape.accumulation)
        batches = [random_batch(number, range(shape.rows), size=shape.size) for number in numbers]
        results.append(engine.step(batches, step=step, lr=1e-3))
        if step == 1:
            evaluations.append(engine.evaluate([random_batch(100, range(ROWS + 2))]))
    return {
        "losses": torch.stack([result.loss for result in results]),
        "norms": torch.stack([result.grad_norm for result in results]),
        "evaluations": evaluations,
        "state": {name: value.clone() for name, value in engine.state_dict().items()},
        "random": torch.random.get_rng_state(),
    }


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for key in ("losses", "norms", "random"):
        assert torch.equal(found[key], expected[key]), key
    assert found["evaluations"] == expected["evaluations"]
    assert found["state"].keys() == expected["state"].keys()
    for name, value in expected["state"].items():
        assert torch.equal(found["state"][name], value), name


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--ema", "0.9", "--clip-grad", "0.1"),
        ("--freeze-bn", "--memory-format", "contiguous"),
        ("--precision", "bf16"),
        ("--optimizer", "sgd", "--nesterov", "--layer-decay", "0.7"),
        ("--optimizer", "lamb", "--loss", "bce"),
    ],
)
def test_replayed_training_equals_eager_training(
    recorders: list[ReplayOnCpu], accumulation: int, options: tuple[str, ...]
) -> None:
    run = partial(train, accumulation=accumulation)
    eager = run(engine_of("--compile", "off", *options, accumulation=accumulation))
    assert not recorders
    engine = engine_of(*options, accumulation=accumulation)  # captured by default
    assert_equal(run(engine), eager)
    (recorder,) = recorders
    assert (recorder.recorded, recorder.replayed) == (12, 12 * 4 * accumulation)
    assert engine.resolved["compile"] == "cudagraphs: forward and backward of 6 parts"


SHAPES = {
    "size and rows": [InputShape(6, 32, 1, 0.5), InputShape(4, 64, 1)],
    "accumulation": [InputShape(4, 32, 1, 0.5), InputShape(2, 64, 2), InputShape(2, 32, 3, 0.75)],
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("options", [("--ema", "0.9", "--clip-grad", "0.1"), ("--precision", "bf16")])
def test_replays_of_several_shapes_equal_eager_training(
    recorders: list[ReplayOnCpu], shapes: list[InputShape], options: tuple[str, ...]
) -> None:
    """The sets of graphs overwrite each other's activations, and share the gradients."""
    eager = train(engine_of("--compile", "off", *options, shapes=shapes), steps=5, shapes=shapes)
    engine = engine_of(*options, shapes=[*shapes, *shapes])  # a schedule may return to a shape
    assert_equal(train(engine, steps=5, shapes=shapes), eager)
    (recorder,) = recorders
    passes = sum(shapes[step % len(shapes)].accumulation for step in range(5))
    assert (recorder.recorded, recorder.replayed) == (12 * len(shapes), 12 * passes)
    assert engine._graphs.keeps_gradients is (len(shapes) == 2)


def test_graphs_of_large_images_are_captured_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their memory contains that of the others."""
    seen: list[int] = []

    class Sizes(ReplayOnCpu):
        def record(self, work: Work) -> tuple[Results, Callable[[], None]]:
            found = super().record(work)
            seen.append(found[0][0].shape[-1] if len(found[0][0].shape) == 4 else 0)
            return found

    monkeypatch.setitem(cuda_graph_capture.RECORDERS, "cpu", Sizes)
    engine_of(shapes=[InputShape(8, 32, 1), InputShape(4, 64, 1), InputShape(8, 64, 1)])
    assert [seen[0], seen[12], seen[24]] == [16, 16, 8]


@pytest.mark.parametrize("number", [13, 24])
def test_a_capture_that_fails_for_one_shape_disables_the_graphs_of_all(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setitem(cuda_graph_capture.RECORDERS, "cpu", lambda device: FailsAt(device, number))
    shapes = SHAPES["size and rows"]
    engine = engine_of(shapes=shapes)
    assert engine.resolved["compile"].startswith("off (capture failed")
    eager = train(engine_of("--compile", "off", shapes=shapes), shapes=shapes)
    assert_equal(train(engine, shapes=shapes), eager)


def test_batches_of_other_shapes_are_rejected(recorders: list[ReplayOnCpu]) -> None:
    engine = engine_of(shapes=SHAPES["size and rows"])
    with pytest.raises(ValueError, match=r"\(4, 3, 32, 32\), .* for \(4, 3, 64, 64\), \(6, 3, 32, 32\); use --compile"):
        engine.step([random_batch(0, range(4))], step=0, lr=0.0)


def test_a_pass_of_another_shape_invalidates_the_activations() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).train()
    graphs, images = GraphedModel(model, ReplayOnCpu(CPU)), [torch.randn(2, 3, size, size) for size in (8, 6)]
    for example in images:
        graphs.capture(example, None)
    first = model(images[0]).sum()
    model(images[1])
    with pytest.raises(RuntimeError, match="second forward pass has overwritten"):
        first.backward()


def test_captured_graphs_use_a_state_loaded_before_the_first_step(recorders: list[ReplayOnCpu]) -> None:
    state = train(engine_of("--compile", "off"), steps=2)["state"]
    found = []
    for options in (("--compile", "off"), ()):
        engine = engine_of(*options)
        engine.load_state_dict(state, steps=2)
        found.append(train(engine))
    assert_equal(found[1], found[0])


def test_state_loaded_after_some_steps_replaces_the_optimizer_state(recorders: list[ReplayOnCpu]) -> None:
    state = train(engine_of("--compile", "off", "--ema", "0.9"), steps=2)["state"]
    found = []
    for options in (("--compile", "off"), ()):
        engine = engine_of("--ema", "0.9", *options)
        train(engine, steps=3)
        engine.load_state_dict(state, steps=2)
        found.append(train(engine))
    assert_equal(found[1], found[0])


def test_non_finite_gradient_skips_the_update_without_affecting_the_next_step(
    recorders: list[ReplayOnCpu],
) -> None:
    found = []
    for options in (("--compile", "off"), ()):
        engine = engine_of("--freeze-bn", *options)
        bad = random_batch(7, range(ROWS))
        bad.images[0, 0, 0, 0] = float("nan")
        assert not engine.step([bad], step=0, lr=1e-3).grad_norm.isfinite()
        found.append(train(engine))
    assert_equal(found[1], found[0])


@pytest.mark.parametrize("number", [1, 6, 7, 12])
def test_eager_training_is_unchanged_after_a_failed_capture(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    made: list[FailsAt] = []

    def make(device: torch.device) -> FailsAt:
        made.append(FailsAt(device, number))
        return made[-1]

    monkeypatch.setitem(cuda_graph_capture.RECORDERS, "cpu", make)
    eager = train(engine_of("--compile", "off", "--ema", "0.9"))
    engine = engine_of("--compile", "cudagraphs", "--ema", "0.9")
    assert engine.notes == [
        "warning: CUDA graph capture failed (RuntimeError: operation not permitted when stream is capturing); "
        "training continues eagerly, without graphs"
    ]
    assert engine.resolved["compile"].startswith("off (capture failed: RuntimeError: operation not permitted")
    assert made[0].released
    assert_equal(train(engine), eager)
    assert made[0].replayed == 0
    assert all(parameter.grad is None for parameter in engine.model.parameters())


def test_capture_preserves_buffers_gradients_and_random_state(recorders: list[ReplayOnCpu]) -> None:
    torch.manual_seed(3)
    model = fat.create_model(CONFIG).train()
    images = random_batch(0, range(ROWS)).images
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    before = torch.random.get_rng_state()
    replayed = GraphedModel(model, ReplayOnCpu(CPU))
    replayed.warm_up(images, None)
    replayed.capture(images, None)
    assert torch.equal(torch.random.get_rng_state(), before)
    for name, value in model.named_buffers():
        assert torch.equal(value, buffers[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())
    assert "forward" in vars(model)
    replayed.discard()
    assert "forward" not in vars(model)


def test_frozen_statistics_do_not_change_in_replays(recorders: list[ReplayOnCpu]) -> None:
    engine = engine_of("--freeze-bn")
    before = {name: value.clone() for name, value in engine.model.named_buffers()}
    train(engine)
    for name, value in engine.model.named_buffers():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("accumulation", [1, 2])
def test_frozen_backbone_is_replayed_without_backward_graphs(recorders: list[ReplayOnCpu], accumulation: int) -> None:
    run = partial(train, accumulation=accumulation)
    eager = run(engine_of("--freeze-backbone", "--compile", "off", accumulation=accumulation))
    engine = engine_of("--freeze-backbone", accumulation=accumulation)
    assert_equal(run(engine), eager)
    (recorder,) = recorders
    assert (recorder.recorded, recorder.replayed) == (
        7,
        7 * 4 * accumulation,
    )  # 6 forward passes, that of the head back


def test_drop_path_differs_between_replays(recorders: list[ReplayOnCpu]) -> None:
    engine = engine_of("--freeze-bn")
    batch = random_batch(0, range(ROWS))
    losses = [engine.step([batch], step=step, lr=0.0).loss.item() for step in (0, 1, 0)]
    assert losses[0] != losses[1]
    assert losses[0] == losses[2]


def test_every_gradient_has_separate_memory_with_its_parameter_s_strides(recorders: list[ReplayOnCpu]) -> None:
    """Clipping scales gradients in place, and AccumulateGrad copies gradients whose strides differ."""
    model = fat.create_model(CONFIG).train().to(memory_format=torch.channels_last)
    replayed = GraphedModel(model, ReplayOnCpu(CPU))
    images = random_batch(0, range(ROWS)).images
    replayed.capture(images, None)
    model(images).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    (parts,) = replayed._captured.values()
    static = [tensor.data_ptr() for part in parts for tensor in part._parameter_grads if tensor is not None]
    assert sorted(gradient.data_ptr() for gradient in gradients) == sorted(static)  # none was copied
    assert len(set(static)) == len(static)
    for parameter in model.parameters():
        assert parameter.grad.stride() == parameter.stride()


def small_model() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
    return model.train(), torch.randn(2, 3, 8, 8)


def captured(model: nn.Module, images: Tensor) -> nn.Module:
    GraphedModel(model, ReplayOnCpu(CPU)).capture(images, None)
    return model


def test_other_models_are_captured_as_one_part() -> None:
    eager, images = small_model()
    replayed = captured(small_model()[0], images)
    for model in (eager, replayed):
        model(images + 1).square().sum().backward()
    for ours, theirs in zip(replayed.parameters(), eager.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


class SharedGradient(nn.Module):
    """Autograd passes the same gradient tensor to both parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.a + self.b)


def test_parameters_with_a_common_gradient_tensor_get_separate_copies() -> None:
    """Clipping would scale a shared tensor twice."""
    model = captured(SharedGradient().train(), torch.randn(2, 3))
    model(torch.randn(2, 3)).sum().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    assert model.a.grad.data_ptr() != model.b.grad.data_ptr()
    assert sum(parameter.grad.square().sum() for parameter in model.parameters()).sqrt() == pytest.approx(0.5, rel=1e-4)


def test_invalid_replays_raise() -> None:
    model, images = small_model()
    captured(model, images)
    with pytest.raises(ValueError, match=r"batch of shape \(3, 3, 8, 8\), but the CUDA graphs were captured for"):
        model(torch.randn(3, 3, 8, 8))
    first = model(images).sum()
    model(images)
    with pytest.raises(RuntimeError, match="second forward pass has overwritten"):
        first.backward()
    model[0].weight.data = model[0].weight.data.clone()
    with pytest.raises(RuntimeError, match="moved in memory"):
        model(images)


def test_model_with_hooks_is_not_captured() -> None:
    model, images = small_model()
    model[0].register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="0 has hooks"):
        captured(model, images)


def test_parameters_with_hooks_are_not_captured_with_static_gradients() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].weight.register_post_accumulate_grad_hook(lambda parameter: None)
    with pytest.raises(RuntimeError, match=r"0\.weight has hooks"):
        GraphedModel(model, ReplayOnCpu(CPU), keeps_gradients=True).capture(torch.zeros(2, 3), None)
    GraphedModel(model, ReplayOnCpu(CPU)).capture(torch.zeros(2, 3), None)


def test_garbage_collector_is_paused_during_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finalizers of graphs and compiled kernels call CUDA, which invalidates the capture."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=None))
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: nullcontext())
    recorder, enabled = CudaRecorder(torch.device("cuda", 0)), list[bool]()

    def work(*, fails: bool) -> list[Tensor | None]:
        enabled.append(gc.isenabled())
        if fails:
            raise RuntimeError("not captured")
        return []

    recorder.record(partial(work, fails=False))
    with pytest.raises(RuntimeError, match="not captured"):
        recorder.record(partial(work, fails=True))
    assert enabled == [False, False]
    assert gc.isenabled()


def test_warmup_uses_a_dense_output_gradient_like_the_capture() -> None:
    """Other strides could select other kernels, which the capture would then launch for the first time."""
    strides: list[tuple[int, ...]] = []

    class Seen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            y = x * self.weight
            y.register_hook(lambda gradient: strides.append(gradient.stride()))
            return y

    graphs, images = GraphedModel(Seen().train(), ReplayOnCpu(CPU)), torch.randn(2, 3)
    graphs.warm_up(images, None)
    graphs.capture(images, None)
    assert strides == [(3, 1), (3, 1)]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--zero", "3"), "ZeRO 3 gathers weights in hooks"),
        (("--sync-bn", "on"), "synchronized BatchNorm uses gloo"),
    ],
)
def test_recipes_that_cannot_be_captured_run_eagerly_unless_cudagraphs_is_requested(
    recorders: list[ReplayOnCpu], monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], reason: str
) -> None:
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_backend", lambda: "gloo")
    execution = resolved(parse([*options]), CPU, accumulation=1, ranks=2)
    assert execution.compile == "off"
    assert reason in execution.eager_reason
    assert not resolved(parse([*options, "--compile", "off"]), CPU, accumulation=1, ranks=2).eager_reason
    with pytest.raises(RecipeError, match=f"--compile cudagraphs: .*{reason}.*; use --compile off"):
        resolved(parse([*options, "--compile", "cudagraphs"]), CPU, accumulation=1, ranks=2)


def test_frozen_batchnorm_is_no_obstacle_to_capture(
    recorders: list[ReplayOnCpu], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_backend", lambda: "gloo")
    assert graph_obstacle(parse(["--sync-bn", "on", "--freeze-bn"]), CPU, ranks=2) == ""


def test_cpus_train_eagerly_without_a_message() -> None:
    execution = resolved(parse([]), CPU, accumulation=1, ranks=1)
    assert (execution.compile, execution.eager_reason) == ("off", "")
    with pytest.raises(RecipeError, match="--compile cudagraphs: requires a CUDA device, but this one is cpu"):
        resolved(parse(["--compile", "cudagraphs"]), CPU, accumulation=1, ranks=1)


def test_gpus_capture_by_default_with_accumulation_and_zero_0_to_2() -> None:
    for zero in ("0", "1", "2"):
        for accumulation in (1, 4):
            found = resolved(parse(["--zero", zero]), torch.device("cuda"), accumulation=accumulation, ranks=1)
            assert found.compile == "cudagraphs"


def test_evaluation_does_not_compile_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile would compile the model again for evaluation mode, in the middle of a run."""
    engine = engine_of("--compile", "off")
    eager = engine.evaluate([random_batch(1, range(ROWS))])
    monkeypatch.setattr(Execution, "uses_compiler", True)
    engine.model._compiled_call_impl = lambda *_: pytest.fail("the compiled call was used")
    assert engine.evaluate([random_batch(1, range(ROWS))]) == eager


# -- host time of a step -----------------------------------------------------------------------------------------------


class Operators(TorchDispatchMode):
    """Counts the PyTorch operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


class DoesNothing(ReplayOnCpu):
    """Replays nothing, so that a replay takes no host time, like that of a CUDA graph."""

    def record(self, work: Work) -> tuple[Results, Callable[[], None]]:
        return super().record(work)[0], lambda: None


def cost_of_step(engine: Engine) -> tuple[int, int]:
    """Return the number of Python function calls and of operators in a step."""
    batch, calls = random_batch(0, range(ROWS)), 0

    def note(frame: object, event: str, arg: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    for step in range(2):
        engine.step([batch], step=step, lr=1e-3)
    sys.setprofile(note)
    try:
        engine.step([batch], step=2, lr=1e-3)
    finally:
        sys.setprofile(None)
    with Operators() as operators:
        engine.step([batch], step=3, lr=1e-3)
    return calls, operators.count


def test_captured_step_makes_few_python_calls_and_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """The only call per parameter is the check that its address has not changed."""
    monkeypatch.setitem(cuda_graph_capture.RECORDERS, "cpu", DoesNothing)
    engine = engine_of("--ema", "0")
    parameters = len(list(engine.model.parameters()))
    calls, operators = cost_of_step(engine)
    assert parameters > 90
    assert calls < parameters + 600
    assert operators < 100


@pytest.mark.parametrize(("accumulation", "stay"), [(1, True), (2, False)])
def test_gradients_stay_in_static_memory_without_accumulation(
    recorders: list[ReplayOnCpu], accumulation: int, stay: bool
) -> None:
    engine = engine_of(accumulation=accumulation)
    train(engine, steps=1, accumulation=accumulation)
    gradients = [parameter.grad for parameter in engine.model.parameters()]
    static = [gradient for part in engine._graphs._parts for gradient in part.gradients]
    assert all(gradient is None for gradient in gradients) is not stay
    if stay:
        assert {id(gradient) for gradient in gradients} == {id(gradient) for gradient in static}


def test_seeding_equals_torch_manual_seed_without_formatting_the_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2**63 + 5)
    expected = torch.random.get_rng_state()
    torch.manual_seed(0)
    monkeypatch.setattr("traceback.format_stack", lambda *_: pytest.fail("the stack was read"))
    seed_generators(CPU, 2**63 + 5)
    assert torch.equal(torch.random.get_rng_state(), expected)
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed", seeded.append)
    seed_generators(torch.device("cuda", 0), 7)
    assert seeded == [7]


def resolved(recipe: Recipe, device: torch.device, *, accumulation: int, ranks: int) -> Execution:
    return Execution.of(recipe, device, accumulation=accumulation, ranks=ranks)

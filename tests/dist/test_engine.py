"""ZeRO stage, world size, gradient accumulation and restarts change results only by the order of summation.

In float32 on fixed random batches with frozen BatchNorm, whose statistics are per rank on CPUs; see `engine_run.py`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch

from tests.dist.forked import Launcher

STEPS = 20
# AdamW divides by the root of tiny second moments, so parameters whose true gradient is zero (biases of convolutions
# before a norm) drift by rounding errors. Therefore all parameters are compared as one vector, by relative norm.
TOLERANCE = 1e-5


class Run(Protocol):
    """Train on `ranks` processes, and return the results of rank 0, which are also written to `out`."""

    def __call__(self, *args: object, ranks: int = 1, zero: int = 0, out: Path | None = None) -> dict[str, Any]: ...


@pytest.fixture(scope="module")
def run(launch: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("runs")
    numbers = itertools.count()

    def trained(*args: object, ranks: int = 1, zero: int = 0, out: Path | None = None) -> dict[str, Any]:
        out = out or folder / f"{next(numbers)}.pt"
        launch("tests.dist.engine_run", out, "--zero", zero, *args, ranks=ranks)
        return torch.load(out, weights_only=True)

    return trained


def slow(*cases: Any) -> list[Any]:
    """Mark cases to run in `make test-all` only."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow) for case in cases]


def distance(a: dict[str, Any], b: dict[str, Any], kind: str) -> float:
    """Return the relative norm of the difference of all tensors of a kind: model, exp_avg, exp_avg_sq or ema."""
    names = [name for name in a["state"] if name.startswith(f"{kind}/") and "running" not in name]
    assert names
    x, y = (torch.cat([run["state"][name].double().flatten() for name in names]) for run in (a, b))
    return float((x - y).norm() / x.norm())


@pytest.fixture(scope="module")
def reference(run: Run) -> dict[str, Any]:
    """Uninterrupted training in one process without ZeRO."""
    result = run("--steps", STEPS, "--ema", "0.9")
    assert result["losses"][-1] < result["losses"][0]
    return result


@pytest.fixture(scope="module")
def half(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], Path]:
    """Function that trains half of the steps with (ZeRO stage, processes), and returns the file of the state."""
    folder = tmp_path_factory.mktemp("half")

    @functools.cache
    def made(zero: int, ranks: int) -> Path:
        out = folder / f"zero-{zero}-on-{ranks}.pt"
        run("--steps", STEPS // 2, "--ema", "0.9", zero=zero, ranks=ranks, out=out)
        return out

    return made


@pytest.mark.parametrize(("zero", "ranks"), [(0, 2), (1, 2), *slow((3, 2), (1, 1), (2, 2), (2, 1), (3, 1))])
def test_same_weights_with_every_zero_stage_and_world_size(
    run: Run, reference: dict[str, Any], zero: int, ranks: int
) -> None:
    result = run("--steps", STEPS, "--ema", "0.9", zero=zero, ranks=ranks)
    assert result["norms"] == pytest.approx(reference["norms"], rel=1e-4)
    for kind in ("model", "exp_avg", "exp_avg_sq", "ema"):
        assert distance(reference, result, kind) < TOLERANCE, kind
    assert result["loss"] == pytest.approx(reference["loss"], rel=1e-4)  # of the EMA weights


# (ZeRO stage, processes) before and after. The default is stage 0 for one GPU, and stage 1 for several.
CHANGES = [((0, 1), (1, 2)), ((1, 2), (0, 1))]
MORE_CHANGES = [
    ((0, 1), (0, 2)),
    ((0, 1), (2, 1)),
    ((0, 1), (3, 2)),
    ((1, 1), (0, 1)),
    ((1, 1), (1, 2)),
    ((2, 2), (0, 1)),
]


@pytest.mark.parametrize(("before", "after"), [*CHANGES, *slow(*MORE_CHANGES)])
def test_a_state_can_be_resumed_with_another_zero_stage_and_world_size(
    run: Run,
    reference: dict[str, Any],
    half: Callable[[int, int], Path],
    before: tuple[int, int],
    after: tuple[int, int],
) -> None:
    options = ("--steps", STEPS, "--state", half(*before), "--at", STEPS // 2, "--ema", "0.9")
    result = run(*options, zero=after[0], ranks=after[1])
    for kind in ("model", "exp_avg", "exp_avg_sq", "ema"):
        assert distance(reference, result, kind) < TOLERANCE, kind


FOREACH = ("--optimizer-impl", "foreach", "--memory-format", "contiguous")


def test_other_optimizer_and_memory_format_options_give_the_same_weights_and_can_resume(
    run: Run, reference: dict[str, Any], half: Callable[[int, int], Path]
) -> None:
    options = ("--ema", "0.9", *FOREACH, "--steps", STEPS)
    whole = run(*options)
    resumed = run(*options, "--state", half(0, 1), "--at", STEPS // 2)
    for result in (whole, resumed):
        for kind in ("model", "exp_avg", "exp_avg_sq", "ema"):
            assert distance(reference, result, kind) < TOLERANCE, kind


@pytest.mark.parametrize(("zero", "micro"), [(1, 4), *slow((0, 2), (0, 4), (3, 2))])
def test_accumulated_micro_batches_give_the_same_update_as_the_global_batch(
    run: Run, reference: dict[str, Any], zero: int, micro: int
) -> None:
    result = run("--steps", STEPS, "--ema", "0.9", "--micro", micro, zero=zero)
    for kind in ("model", "ema"):
        assert distance(reference, result, kind) < TOLERANCE, kind


@pytest.mark.parametrize(
    ("zero", "ranks", "shapes"),
    [(0, 2, ("4x32", "1x64")), (1, 2, ("1x32", "4x64")), (3, 2, ("4x32", "2x64")), *slow((2, 2, ("4x32", "1x64")))],
)
def test_micro_batches_that_change_in_number_and_size_give_the_same_updates(
    run: Run, shapes_reference: dict[str, Any], zero: int, ranks: int, shapes: tuple[str, ...]
) -> None:
    result = run("--steps", 6, "--ema", "0.9", "--shapes", *shapes, zero=zero, ranks=ranks)
    assert result["norms"] == pytest.approx(shapes_reference["norms"], rel=1e-4)
    for kind in ("model", "exp_avg", "exp_avg_sq", "ema"):
        assert distance(shapes_reference, result, kind) < TOLERANCE, kind


@pytest.fixture(scope="module")
def shapes_reference(run: Run) -> dict[str, Any]:
    """Training in one process without accumulation, with images of two sizes."""
    return run("--steps", 6, "--ema", "0.9", "--shapes", "8x32", "8x64")


@pytest.mark.parametrize(("zero", "ranks"), slow((0, 2), (1, 2), (2, 1), (3, 2)))
def test_sgd_gives_the_same_weights_with_every_zero_stage_and_can_resume(
    run: Run, tmp_path: Path, zero: int, ranks: int
) -> None:
    options = ("--optimizer", "sgd", "--nesterov", "--ema", "0.9")
    reference, half = run("--steps", 8, *options), tmp_path / "half.pt"
    whole = run("--steps", 8, *options, zero=zero, ranks=ranks)
    run("--steps", 4, *options, zero=zero, ranks=ranks, out=half)
    resumed = run("--steps", 8, "--state", half, "--at", 4, *options, zero=zero, ranks=ranks)
    for result in (whole, resumed):
        for kind in ("model", "momentum_buffer", "ema"):
            assert distance(reference, result, kind) < TOLERANCE, kind


@pytest.mark.slow
@pytest.mark.parametrize(("zero", "ranks"), [(0, 1), (0, 2), (1, 2), (2, 2)])
def test_linear_probe_changes_only_the_classifier(run: Run, zero: int, ranks: int) -> None:
    probe = ("--freeze-backbone", "--statistics", "--ema", "0.9")
    start, reference = run("--steps", 0, *probe)["state"], run("--steps", 4, *probe)["state"]
    found = run("--steps", 4, *probe, zero=zero, ranks=ranks)["state"]
    assert found.keys() == start.keys()
    for name, value in start.items():
        if "/head." not in name:
            assert torch.equal(found[name], value), name
        else:  # the classifier, its moments and its EMA
            assert not torch.equal(found[name], value), name
            torch.testing.assert_close(found[name], reference[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("zero", "ranks", "how"),
    [(0, 1, ()), (0, 1, FOREACH), (1, 2, ()), *slow((0, 2, ()), (2, 2, ()), (3, 2, ()), (1, 2, FOREACH))],
)
def test_a_step_with_a_non_finite_gradient_changes_nothing(
    run: Run, zero: int, ranks: int, how: tuple[str, ...]
) -> None:
    before = run("--steps", "2", *how, zero=zero, ranks=ranks)
    after = run("--steps", "3", "--poison", "2", *how, zero=zero, ranks=ranks)
    assert not torch.tensor(after["norms"][2]).isfinite()
    for name, value in before["state"].items():
        if "running" not in name:
            assert torch.equal(value, after["state"][name]), name


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 1])
def test_with_sync_bn_the_number_of_ranks_does_not_matter(run: Run, zero: int) -> None:
    """BatchNorm trains here, and its statistics would differ between ranks without --sync-bn. With SGD, because AdamW
    amplifies gradients that are only rounding, such as those of biases before a norm."""
    options = ("--steps", "10", "--statistics", "--drop-path", "0", "--optimizer", "sgd")
    one = run(*options)
    two = run(*options, "--sync-bn", "on", zero=zero, ranks=2)
    apart = run(*options, "--sync-bn", "off", zero=zero, ranks=2)
    assert two["norms"] == pytest.approx(one["norms"], rel=1e-5)
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)
    assert apart["norms"] != pytest.approx(one["norms"], rel=1e-2)


REPLAYED = ("--statistics", "--drop-path", "0.3", "--ema", "0.9", "--steps", "4")


@pytest.mark.parametrize(
    ("zero", "ranks", "micro"), [(0, 2, 2), (1, 2, 2), *slow((0, 2, 4), (1, 2, 4), (1, 1, 2), (2, 2, 2), (2, 1, 2))]
)
def test_replayed_training_equals_eager_training_on_several_ranks(run: Run, zero: int, ranks: int, micro: int) -> None:
    """With gradient accumulation, in which DDP and DeepSpeed keep gradients in the memory of a graph."""
    options = (*REPLAYED, "--micro", micro)
    eager = run(*options, zero=zero, ranks=ranks)
    replayed = run(*options, "--replay", zero=zero, ranks=ranks)
    assert (eager["compile"], replayed["compile"]) == ("off", "cudagraphs: forward and backward of 6 parts")
    assert replayed["replayed"] == 4 * (8 // ranks // micro) * 12  # steps, micro-batches, graphs
    assert eager["state"]["model/stem.convs.0.bn.num_batches_tracked"] == 4 * (8 // ranks // micro)
    assert_same(replayed, eager)


@pytest.mark.parametrize(("zero", "ranks"), [(1, 2), *slow((0, 2), (2, 2))])
def test_replays_of_several_shapes_equal_eager_training_on_several_ranks(run: Run, zero: int, ranks: int) -> None:
    options = (*REPLAYED, "--shapes", "4x32", "2x64")
    eager, replayed = run(*options, zero=zero, ranks=ranks), run(*options, "--replay", zero=zero, ranks=ranks)
    assert replayed["replayed"] == 2 * (1 + 2) * 12
    assert_same(replayed, eager)


def test_all_ranks_train_eagerly_if_the_capture_fails_on_one(run: Run) -> None:
    eager = run(*REPLAYED, ranks=2)
    failed = run(*REPLAYED, "--replay", "--fails-on", 1, ranks=2)
    (note,) = failed["notes"]  # of rank 0
    assert "capture failed (rank 1: RuntimeError: operation not permitted" in note
    assert failed["compile"].startswith("off (capture failed: rank 1")
    assert_same(failed, eager)


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Check that losses, norms and state are equal bit by bit."""
    for key in ("losses", "norms", "loss"):
        assert found[key] == expected[key], key
    for name, value in expected["state"].items():
        assert torch.equal(found["state"][name], value), name


@pytest.mark.parametrize("zero", [1, *slow(0, 2, 3)])
def test_bf16_stays_near_fp32(run: Run, reference: dict[str, Any], zero: int) -> None:
    result = run("--steps", STEPS, "--ema", "0.9", "--precision", "bf16", zero=zero)
    assert distance(reference, result, "model") < 0.05
    assert result["losses"] == pytest.approx(reference["losses"], rel=0.1)

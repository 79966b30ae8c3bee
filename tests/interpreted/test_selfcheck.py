"""The self-check of kernels: right kernels pass, and a fault in any family is attributed to this family."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fat
from fat import kernels
from fat.config import FATConfig
from fat.kernels import families, selfcheck
from fat.kernels.impl import attention, batchnorm, channel_sums, depthwise, depthwise_weight_grad, gate, norm, norm_relu
from fat.kernels.selfcheck import Case
from fat.kernels.selfcheck.case import Spec
from fat.kernels.selfcheck.trace import BATCH
from launch.engine.kernel_check import check_kernels
from launch.machine.world import World
from pipeline.augment import kernels as augment_kernels
from pipeline.augment import selfcheck as augment_selfcheck
from pipeline.augment.recipe import AugmentRecipe, augment_recipe
from pipeline.augment.triton_impl import finishing, randaugment

CPU = torch.device("cpu")
ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=CPU)
NET = FATConfig(
    widths=(8, 8, 8, 8),
    depths=(1, 1, 1, 2),
    heads=(1, 1, 1, 1),
    kernels=(3, 5, 7, 11),  # 11x11 is not supported by the kernels, so that the gate is a separate operator
    windows=(2, 1, 1, 1),
    ffn_ratio=2,
    drop_path=0.4,
    num_classes=3,
)
SIZE = 33  # feature maps of 9, 5, 3 and 2 pixels per side
LARGEST = 4000  # maximum input elements of a call, because the interpreter is slow
RECIPE: AugmentRecipe = augment_recipe("fat", size=8)


@pytest.fixture(autouse=True)
def _all_switched_on() -> Iterator[None]:
    """Switch all families on again after each test."""
    with kernels.disabled(), augment_kernels.disabled():
        yield


@pytest.fixture(scope="module")
def model() -> fat.FAT:
    torch.manual_seed(0)
    return fat.create_model(NET).train()


@pytest.fixture(scope="module")
def every_case(model: fat.FAT) -> list[Case]:
    return selfcheck.cases(model, SIZE, torch.bfloat16)


def numbers(case: Case) -> int:
    return sum(torch.Size(a.shape).numel() for a in case.arguments if isinstance(a, Spec))


@pytest.fixture(scope="module")
def few_cases(every_case: list[Case]) -> list[Case]:
    """Return the smallest call of each operator, because the interpreter is slow."""
    smallest: dict[str, Case] = {}
    for case in sorted(every_case, key=numbers):
        smallest.setdefault(case.operator, case)
    return [case for case in every_case if smallest[case.operator] == case]


def test_right_kernels_pass(every_case: list[Case]) -> None:
    checks = [case for case in every_case if numbers(case) < LARGEST]
    assert selfcheck.run(checks, CPU) == []
    assert {case.operator for case in checks} == set(families.OPERATORS)
    assert {case.families[-1] for case in checks} == set(kernels.FAMILIES)
    assert {case.dtype for case in checks if case.map_rows()} == {"bfloat16"}


@pytest.mark.slow
def test_statistics_of_many_tiles_are_merged_in_two_rounds(
    every_case: list[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    (case,) = (case for case in every_case if case.map_rows() and case.arguments[0].shape[0] > BATCH)
    rounds: list[int] = []
    launch = batchnorm._join.run

    def counted(*args: Any, grid: tuple[int, ...], **options: Any) -> Any:
        rounds.append(grid[0])
        return launch(*args, grid=grid, **options)

    monkeypatch.setattr(batchnorm._join, "run", counted)
    assert selfcheck.run([case], CPU) == []
    assert rounds == [2, 1]


def test_right_kernels_pass_without_autocast(few_cases: list[Case]) -> None:
    """The same calls with fp32 feature maps."""

    def wider(a: Any) -> Any:
        if isinstance(a, Spec):
            return replace(a, dtype=torch.float32 if a.dtype == torch.bfloat16 else a.dtype)
        return torch.float32 if a == torch.bfloat16 else a

    checks = [Case(case.operator, tuple(map(wider, case.arguments))) for case in few_cases]
    assert selfcheck.run(checks, CPU) == []


def changed(function: Callable[..., Any], change: Callable[[tuple[Any, ...], dict[str, Any]], None]) -> Any:
    """Wrap a launch function so that `change` is applied to its arguments after the call."""

    @wraps(function)
    def run(*args: Any, **options: Any) -> Any:
        result = function(*args, **options)
        change(args, options)
        return result

    return run


def spoil(value: Tensor) -> None:
    """Change one element by 3 % of the largest one: 4 units in bfloat16's last place, where 1 is allowed."""
    value[(0,) * value.ndim] += (0.03 * value.float().abs().max()).to(value.dtype)


@dataclass(frozen=True)
class Wrong:
    """A fault in a launch function, and the family that must fail because of it."""

    family: str
    module: Any
    function: str
    make: Callable[[Callable[..., Any]], Callable[..., Any]]
    reason: str

    def __str__(self) -> str:
        return f"{self.function}: {self.reason}"


def _transposed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Pass the kernel transposed."""
    return lambda x, weight, *rest, **options: function(x, weight.transpose(2, 3), *rest, **options)


def _without_last_row(function: Callable[..., Any]) -> Callable[..., Any]:
    def change(args: tuple[Any, ...], options: dict[str, Any]) -> None:
        args[3][:, :, -1] = 0

    return changed(function, change)


def _unwritten(index: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def make(function: Callable[..., Any]) -> Callable[..., Any]:
        def change(args: tuple[Any, ...], options: dict[str, Any]) -> None:
            args[index][(-1,) * args[index].ndim] = float("nan")

        return changed(function, change)

    return make


def _off_by_a_little(index: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def make(function: Callable[..., Any]) -> Callable[..., Any]:
        return changed(function, lambda args, options: spoil(args[index]))

    return make


def _scaled_result(number: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make one of the results 0.1 % too large."""

    def make(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            results = list(function(*args, **options))
            results[number] = results[number] * 1.001
            return tuple(results)

        return run

    return make


def _scaled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: function(*args) * 1.001


def _raises(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **options: Any) -> Any:
        raise RuntimeError("\nout of resource: shared memory\nand more")

    return run


INEXACT = "exceeds the tolerance"
WRONG = [
    Wrong(families.CONVOLUTION, depthwise, "convolve", _transposed, INEXACT),
    Wrong(families.CONVOLUTION, depthwise, "convolve", _without_last_row, INEXACT),
    Wrong(families.CONVOLUTION, depthwise, "convolve", _off_by_a_little(3), INEXACT),
    Wrong(families.CONVOLUTION, depthwise, "convolve", _raises, "RuntimeError: out of resource: shared memory"),
    Wrong(families.INPUT_GRADIENT, depthwise, "input_gradient", _off_by_a_little(3), INEXACT),
    Wrong(families.INPUT_GRADIENT, depthwise, "input_gradient", _unwritten(3), "NaN"),
    Wrong(families.WEIGHT_GRADIENT, depthwise_weight_grad, "weight_gradient", _scaled_result(0), INEXACT),
    Wrong(families.WEIGHT_GRADIENT, depthwise_weight_grad, "weight_gradient", _scaled_result(1), INEXACT),
    Wrong(families.GATE, gate, "gate", _off_by_a_little(2), INEXACT),
    Wrong(families.GATE, gate, "gate_gradient", _unwritten(4), "NaN"),
    Wrong(families.ATTENTION, attention, "attend", _off_by_a_little(4), INEXACT),
    Wrong(families.ATTENTION, attention, "attend_gradient", _off_by_a_little(5), INEXACT),
    Wrong(families.ATTENTION, attention, "attend_gradient", _unwritten(6), "NaN"),
    Wrong(families.NORM, norm, "normalize", _scaled_result(0), INEXACT),
    Wrong(families.NORM, norm, "normalize", _off_by_a_little(4), INEXACT),
    Wrong(families.NORM, norm, "gradients", _off_by_a_little(7), INEXACT),
    Wrong(families.NORM, norm, "add", _off_by_a_little(3), INEXACT),
    Wrong(families.BATCH_NORM, batchnorm, "merge_stats", _scaled_result(1), INEXACT),
    Wrong(families.BATCH_NORM, batchnorm, "fold", _off_by_a_little(7), INEXACT),
    Wrong(families.BATCH_NORM, batchnorm, "fold_gradient", _scaled_result(4), INEXACT),
    Wrong(families.BATCH_NORM, batchnorm, "update_running_stats", _off_by_a_little(1), INEXACT),
    Wrong(families.BATCH_NORM, norm_relu, "channel_stats", _scaled_result(1), INEXACT),
    Wrong(families.BATCH_NORM, norm_relu, "norm_relu", _off_by_a_little(6), INEXACT),
    Wrong(families.BATCH_NORM, norm_relu, "norm_relu_sums", _scaled, INEXACT),
    Wrong(families.BATCH_NORM, norm_relu, "norm_relu_gradient", _off_by_a_little(10), INEXACT),
    Wrong(families.BIAS_GRADIENT, channel_sums, "channel_sums", _off_by_a_little(1), INEXACT),
    Wrong(families.BIAS_GRADIENT, channel_sums, "channel_sums", _unwritten(1), "NaN"),
]


def _one_of_each_family() -> list[Any]:
    """Return WRONG, with all but the first entry of each family marked as slow."""
    first = {wrong.family: wrong for wrong in reversed(WRONG)}.values()
    return [pytest.param(wrong, marks=() if wrong in first else pytest.mark.slow) for wrong in WRONG]


@pytest.mark.parametrize("wrong", _one_of_each_family(), ids=str)
def test_a_fault_is_attributed_to_its_family(
    wrong: Wrong, few_cases: list[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wrong.module, wrong.function, wrong.make(getattr(wrong.module, wrong.function)))
    (failure,) = selfcheck.run(few_cases, CPU)
    assert failure.family == wrong.family
    assert wrong.reason in failure.reason
    assert wrong.family in families.OPERATORS[failure.operator]
    assert failure.shape.startswith(("feature map 2x", "weights "))
    assert failure.dtype in ("bfloat16", "float32")


def test_faults_are_tested_in_every_family() -> None:
    assert {wrong.family for wrong in WRONG} == set(kernels.FAMILIES)


def step(model: nn.Module, inputs: Tensor) -> list[Tensor]:
    """Return the result and gradients of a training step of a copy, with the same drop path at every call."""
    model = copy.deepcopy(model)
    torch.manual_seed(1)
    result = model(inputs)
    result.square().sum().backward()
    return [result.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def break_launches(off: Collection[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Switch families off, and make every launch of their kernels raise."""
    kernels.disable(*off)
    for wrong in WRONG:
        if wrong.family in off:
            monkeypatch.setattr(wrong.module, wrong.function, _raises(getattr(wrong.module, wrong.function)))


@pytest.mark.parametrize("family", kernels.FAMILIES)
def test_a_stage_trains_with_a_family_switched_off(
    family: str, model: fat.FAT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fallback is used even if the family's kernels raise."""
    # The input gradient at stride 1 is launched by the same function as the convolution.
    off = {families.CONVOLUTION, families.INPUT_GRADIENT} if family == families.CONVOLUTION else {family}
    break_launches(off, monkeypatch)
    drawn = torch.randn(2, 8, 5, 4, generator=torch.Generator().manual_seed(2))
    expect_torchs_step(model.stages[0], drawn.contiguous(memory_format=torch.channels_last))


def test_a_net_trains_with_all_families_switched_off(model: fat.FAT, monkeypatch: pytest.MonkeyPatch) -> None:
    break_launches(kernels.FAMILIES, monkeypatch)
    images = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    expect_torchs_step(model, images)


def expect_torchs_step(model: nn.Module, inputs: Tensor) -> None:
    found = step(model, inputs)
    with kernels.use("off"):
        exact = step(model, inputs)
    scale = max(float(t.abs().max()) for t in exact)
    for actual, expected in zip(found, exact, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5 * scale)


def test_a_wrong_kernel_is_reported_and_its_family_switched_off(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = fat.create_model(NET)
    monkeypatch.setattr(depthwise, "convolve", _transposed(depthwise.convolve))
    verdict = check_kernels(model, ALONE, sizes=[SIZE], dtype=torch.float32, gradients=False)
    assert [failure.family for failure in verdict.failed] == [families.CONVOLUTION]
    assert families.NORM in verdict.checked
    printed = capsys.readouterr().err
    warning = (
        "warning: the depthwise convolution kernels differ from PyTorch, so PyTorch is used instead: depthwise on "
    )
    assert printed.count("warning: ") == 1
    assert warning in printed
    assert "exceeds the tolerance of" in printed
    assert kernels.switched_off() == {families.CONVOLUTION}


# Augmentation


def test_right_augmentation_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augment_selfcheck, "ODD_SIZE", 9)
    for dtype in (torch.float32, torch.bfloat16):
        checks = augment_selfcheck.cases(RECIPE, dtype)
        assert [check.family for check in checks] == 2 * list(augment_kernels.FAMILIES)
        assert selfcheck.run(checks, CPU) == []


def _one_level_more(apply_ops: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(images: Tensor, *args: Any, **options: Any) -> Tensor:
        found = apply_ops(images, *args, **options).clone()
        found[-1, 3, 2, 1] ^= 1
        return found

    return run


def _brighter(finish: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: finish(*args) * 1.001


def _lost(finish: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*args: Any) -> Tensor:
        found = finish(*args)
        found[0, 0, 0, 0] = float("nan")
        return found

    return run


@pytest.mark.parametrize(
    ("family", "module", "function", "make", "reason"),
    [
        (augment_kernels.RANDAUGMENT, randaugment, "apply_ops", _one_level_more, "1 bytes of"),
        (augment_kernels.RANDAUGMENT, randaugment, "apply_ops", _raises, "RuntimeError: out of resource"),
        (augment_kernels.FINISHING, finishing, "finish", _brighter, "exceeds the tolerance"),
        (augment_kernels.FINISHING, finishing, "finish", _lost, "NaN"),
    ],
)
def test_a_fault_in_augmentation_is_attributed_to_its_family_which_falls_back_to_torch(  # noqa: PLR0917
    family: str, module: Any, function: str, make: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(augment_selfcheck, "ODD_SIZE", 9)
    monkeypatch.setattr(module, function, make(getattr(module, function)))
    checks = augment_selfcheck.cases(RECIPE, torch.float32)
    (failure,) = selfcheck.run(checks, CPU)
    assert failure.family == family
    assert reason in failure.reason
    augment_kernels.disable(family)  # the fallback passes
    assert selfcheck.run([check for check in checks if check.family == family], CPU) == []

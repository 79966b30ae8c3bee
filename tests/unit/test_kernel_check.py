"""The self-check of kernels: which calls are compared, how failures are reported, and what they switch off."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fat
from fat import kernels
from fat.config import FATConfig
from fat.kernels import families, selfcheck
from fat.kernels.impl import tiles
from fat.kernels.prefill.compile_ahead import Report
from fat.kernels.selfcheck import Failure, KernelFault, comparison, trace
from fat.kernels.selfcheck.comparison import mismatch
from launch.config.command_line import parse
from launch.config.errors import RecipeError
from launch.engine import kernel_check
from launch.engine.execution import kernels_from_environment
from launch.engine.kernel_check import KernelCheckResult, KernelsUnusable, check_kernels
from launch.machine.world import World
from launch.train import main as train
from launch.tuning.command import tune
from pipeline.augment import kernels as augment_kernels
from pipeline.augment import selfcheck as augment_selfcheck
from pipeline.augment.recipe import augment_recipe
from shards.progress import Phases
from tests.support.commands import SMALL
from tests.support.commands import run as run_command

CPU = torch.device("cpu")
ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=CPU)
NET = FATConfig(
    widths=(8, 8, 8, 8), depths=(3, 1, 2, 1), heads=(1,) * 4, windows=(2, 1, 1, 1), drop_path=0.2, num_classes=3
)
REASON = "mean: error 0.5 exceeds the tolerance of 0.01"
NORM = Failure(families.NORM, "add_norm", "feature map 2x8x9x9", "bfloat16", REASON)


@pytest.fixture(scope="module")
def model() -> fat.FAT:
    return fat.create_model(NET)


@pytest.fixture(autouse=True)
def _all_families_on(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with kernels.disabled(), augment_kernels.disabled():
        yield


# Comparison


@dataclass(frozen=True)
class Stub:
    """A check with a given outcome: None, a fault or an exception."""

    family: str
    outcome: Any = None
    families: tuple[str, ...] = ()
    operator: str = "operator"
    shape: str = "feature map 1x2x3x4"
    dtype: str = "float32"

    def compare(self, device: torch.device) -> tuple[str, str] | None:
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    def launch(self) -> str:
        return self.family


def stub(*names: str, outcome: Any = None) -> Stub:
    return Stub(names[-1], outcome, names)


class NotCompiled(Exception):
    """Like Triton's compile error, whose text begins with the source code."""

    error_message = "\n  cannot convert x\nmore"

    def __str__(self) -> str:
        return "at 12:3:\ndef kernel():\n" + self.error_message


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        ((families.GATE, "result: off by 1"), "result: off by 1"),
        (RuntimeError("\nout of resource: shared memory\n detail"), "RuntimeError: out of resource: shared memory"),
        (NotCompiled(), "NotCompiled: cannot convert x"),
        (KeyError(), "KeyError: no message"),
    ],
)
def test_a_failure_names_family_operator_shape_dtype_and_reason(outcome: Any, reason: str) -> None:
    others = [stub(families.CONVOLUTION), stub(families.BATCH_NORM)]
    (failure,) = selfcheck.run([others[0], stub(families.GATE, outcome=outcome), others[1]], CPU)
    assert failure == Failure(families.GATE, "operator", "feature map 1x2x3x4", "float32", reason)
    assert str(failure) == f"operator on feature map 1x2x3x4 float32: {reason}"


def test_checks_that_launch_kernels_of_a_failed_family_are_skipped() -> None:
    """The convolution is wrong, but the norm, which reads its result, is not."""
    wrong = (families.CONVOLUTION, "output: off by 1")
    error = RuntimeError("launched although the convolution has failed")
    checks = [
        stub(families.CONVOLUTION, families.NORM, outcome=wrong),
        stub(families.CONVOLUTION, families.NORM, outcome=error),
        stub(families.CONVOLUTION, outcome=error),
        stub(families.NORM),
    ]
    assert [failure.family for failure in selfcheck.run(checks, CPU)] == [families.CONVOLUTION]


def test_all_families_are_on_during_the_check() -> None:
    kernels.disable(families.GATE)
    seen: list[frozenset[str]] = []

    class Probe(Stub):
        def compare(self, device: torch.device) -> None:
            seen.append(kernels.switched_off())

    selfcheck.run([Probe(families.GATE, families=(families.GATE,))], CPU)
    assert seen == [frozenset()]
    assert kernels.switched_off() == {families.GATE}


def test_running_out_of_memory_is_not_reported_as_a_failure() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        selfcheck.run([stub(families.GATE, outcome=torch.OutOfMemoryError("out of memory"))], CPU)


def test_an_unusable_device_ends_the_process_with_one_line(model: fat.FAT, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an illegal memory access every later call on the device fails too."""

    def lost(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(comparison, "_synchronize", lost)
    with pytest.raises(KernelFault) as caught:
        selfcheck.run([stub(families.GATE)], CPU)
    line = str(caught.value)
    assert line == (
        "the gate kernels have made cpu unusable for this process (operator on feature map 1x2x3x4 float32: "
        "RuntimeError: CUDA error: an illegal memory access was encountered)"
    )
    pretend_kernels_run_on_cpu(monkeypatch, failed=KernelFault(line))
    with pytest.raises(KernelsUnusable, match="start again with FAT_KERNELS=off") as error:
        check(model)
    assert error.value.exit_code == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tolerance_is_a_unit_in_the_last_place_plus_a_fraction_of_the_largest_result(dtype: torch.dtype) -> None:
    exact = torch.tensor([1.0, 0.0, -8.0], dtype=torch.float64)
    unit, fraction = torch.finfo(dtype).eps, 8 * comparison.SUMMING
    tolerances = torch.tensor([unit + fraction, fraction, 8 * unit + fraction])
    assert mismatch(exact.to(dtype), exact) is None
    assert mismatch(exact.to(dtype), exact - 0.99 * tolerances) is None
    for index, tolerance in enumerate((unit + fraction, fraction, 8 * unit + fraction)):
        wrong = exact.clone()
        wrong[index] += 1.01 * tolerance
        fault = mismatch(exact.to(dtype), wrong)
        assert fault is not None
        assert "(1 of 3 values are out of tolerance)" in fault
    for value in (float("nan"), float("inf")):
        assert mismatch(torch.tensor([value, 0.0]), torch.zeros(2)) == "1 of 2 values are NaN or infinite"


# The operator calls that are compared


def test_cases_change_neither_the_model_nor_the_random_state(model: fat.FAT) -> None:
    before, text, training = torch.get_rng_state(), str(model), model.training
    selfcheck.cases(model, 64, torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), before)
    assert (str(model), model.training) == (text, training)
    assert all(p.device == CPU and p.grad is None for p in model.parameters())


def test_cases_are_the_models_calls_in_the_order_of_families(model: fat.FAT) -> None:
    found = selfcheck.cases(model, 224, torch.bfloat16)
    assert len(found) == len(set(found))
    order = [kernels.FAMILIES.index(case.families[-1]) for case in found]
    assert order == sorted(order)
    shapes = {case.shape for case in found if case.operator == "depthwise_norm"}
    # Each stage's feature map and kernel, odd feature maps with the same tiles, and channels that fill no tile.
    assert {f"feature map 2x8x{n}x{n}, kernel {k}x{k}" for n, k in ((56, 3), (28, 5), (14, 7), (7, 9))} < shapes
    assert "feature map 2x8x27x33, kernel 3x3" in shapes
    assert any(shape.startswith(f"feature map 2x{trace.ODD_CHANNELS}x") for shape in shapes)
    assert {case.dtype for case in found if case.map_rows()} == {"bfloat16"}
    assert {case.dtype for case in selfcheck.cases(model, 64, torch.float32)} == {"float32"}


@pytest.mark.parametrize("fused", [False, True])
def test_cases_of_evaluation_have_no_gradients(model: fat.FAT, fused: bool) -> None:
    found = selfcheck.cases(fat.fuse(model) if fused else model, 64, torch.float32, gradients=False)
    assert {case.operator for case in found} <= {
        "depthwise",
        "depthwise_gate",
        "depthwise_norm",
        "norm",
        "add",
        "add_norm",
        "attend",
    }
    assert {"depthwise", "depthwise_gate"} <= {case.operator for case in found}


def test_frozen_norms_are_not_folded(model: fat.FAT) -> None:
    found = {case.operator for case in selfcheck.cases(model, 64, torch.float32, frozen_norms=True)}
    assert "depthwise_weight_gradient" in found
    assert not {name for name in found if families.OPERATORS[name][-1] == families.BATCH_NORM}


@pytest.mark.parametrize("size", [32, 64, 160, 224, 384])
def test_odd_feature_maps_have_the_tiles_of_the_real_ones(size: int) -> None:
    rows = trace.odd_rows(size)
    assert rows % 2
    assert 4 * rows >= 32
    assert size < 64 or tiles.best(rows) == tiles.best(size // 4)


# Verdicts


def pretend_kernels_run_on_cpu(monkeypatch: pytest.MonkeyPatch, *, failed: Any = ()) -> list[str]:
    """Treat kernels as available on the CPU, with the given result of the self-check.

    Returns a list to which the checked families are appended.
    """
    compared: list[str] = []

    def run(checks: list[Any], device: torch.device) -> list[Failure]:
        compared.extend(check.family for check in checks)
        if isinstance(failed, Exception):
            raise failed
        return list(failed)

    def cases(*args: Any, **options: Any) -> list[Stub]:
        return [stub(families.CONVOLUTION), stub(families.NORM)]

    def augmented(*args: Any) -> list[Stub]:
        return [stub(augment_kernels.FINISHING)]

    monkeypatch.setattr(kernels, "supported", lambda device: True)
    monkeypatch.setattr(augment_kernels, "available", lambda device: True)
    monkeypatch.setattr(kernel_check.selfcheck, "run", run)
    monkeypatch.setattr(kernel_check.selfcheck, "cases", cases)
    monkeypatch.setattr(kernel_check.augment_selfcheck, "cases", augmented)
    return compared


def check(model: fat.FAT, **options: Any) -> KernelCheckResult:
    settings: dict[str, Any] = {"sizes": [64], "dtype": torch.bfloat16, **options}
    return check_kernels(model, settings.pop("world", ALONE), **settings)


def test_without_kernels_nothing_is_compared(model: fat.FAT, capsys: pytest.CaptureFixture[str]) -> None:
    verdict = check(model, augment=augment_recipe("fat"))
    assert verdict == KernelCheckResult()
    assert verdict.resolved == {"kernel check": "not compared"}
    assert capsys.readouterr().err == ""


def test_kernels_are_compared_at_every_image_size_once(model: fat.FAT, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = pretend_kernels_run_on_cpu(monkeypatch)
    found = lambda model, size, dtype, **_: [stub(families.CONVOLUTION), stub(f"at {size} pixels")]  # noqa: E731
    monkeypatch.setattr(kernel_check.selfcheck, "cases", found)
    check(model, sizes=[64, 96])
    assert compared == [families.CONVOLUTION, "at 64 pixels", "at 96 pixels"]


def test_every_start_runs_the_check_and_writes_no_files(
    model: fat.FAT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compared = pretend_kernels_run_on_cpu(monkeypatch)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    for _ in range(2):
        verdict = check(model)
        assert (verdict.checked, verdict.failed) == ((families.CONVOLUTION, families.NORM), ())
        assert verdict.resolved["kernel check"] == (
            f"2 families compared in {verdict.seconds:.1f} s; all agree with PyTorch"
        )
    assert compared == [families.CONVOLUTION, families.NORM] * 2
    assert capsys.readouterr().err == ""
    assert not list(tmp_path.iterdir())


def test_a_failed_family_is_switched_off_with_one_warning(
    model: fat.FAT, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = Failure(augment_kernels.FINISHING, "batch finishing", "images of 64x64", "bfloat16", "1 of 9 are NaN")
    pretend_kernels_run_on_cpu(monkeypatch, failed=[NORM, failed])
    verdict = check(model, augment=augment_recipe("fat"))
    assert kernels.switched_off() == {families.NORM}
    assert augment_kernels.switched_off() == {augment_kernels.FINISHING}
    assert capsys.readouterr().err.splitlines() == [
        "warning: the norm kernels differ from PyTorch, so PyTorch is used instead: add_norm on feature map "
        "2x8x9x9 bfloat16: mean: error 0.5 exceeds the tolerance of 0.01",
        "warning: the batch finishing kernels differ from PyTorch, so PyTorch is used instead: batch finishing on "
        "images of 64x64 bfloat16: 1 of 9 are NaN",
    ]
    assert verdict.failed == (NORM, failed)
    assert verdict.resolved["kernel check"].endswith("; disabled: norm, batch finishing")


@pytest.mark.parametrize(
    ("process", "mode", "compared"),
    [
        ("auto", None, ("model", "loader")),
        ("unchecked", None, ()),
        ("off", None, ()),
        ("auto", "unchecked", ("loader",)),
        ("auto", "off", ("loader",)),
        ("unchecked", "auto", ("model",)),
        ("off", "auto", ("model",)),
    ],
)
def test_only_kernels_that_are_used_and_not_excluded_are_compared(
    process: kernels.Mode, mode: Any, compared: tuple[str, ...], model: fat.FAT, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = pretend_kernels_run_on_cpu(monkeypatch)
    with kernels.use(process):
        verdict = check(model, mode=mode, augment=augment_recipe("fat"))
    expected = [*((families.CONVOLUTION, families.NORM) if "model" in compared else ())]
    expected += [augment_kernels.FINISHING] if "loader" in compared else []
    assert verdict.checked == tuple(expected)
    assert checked == expected
    if not compared:
        assert verdict.resolved == {"kernel check": "not compared"}


def test_the_environment_is_read_at_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAT_KERNELS", "off")
    assert kernels.mode() == "auto"
    with kernels_from_environment():
        assert kernels.mode() == "off"
    assert kernels.mode() == "auto"
    monkeypatch.setenv("FAT_KERNELS", "maybe")
    with pytest.raises(RecipeError, match=r"^FAT_KERNELS=maybe: expected auto, off or unchecked$"):
        kernels_from_environment().__enter__()


def test_a_check_that_cannot_run_does_not_stop_the_training(
    model: fat.FAT, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend_kernels_run_on_cpu(monkeypatch)

    def cases(*args: Any, **options: Any) -> list[Stub]:
        raise TypeError("cannot trace\nthis")

    monkeypatch.setattr(kernel_check.selfcheck, "cases", cases)
    verdict = check(model)
    line = "the self-check of the kernels failed (TypeError: cannot trace); they are used unchecked"
    assert verdict == KernelCheckResult(warnings=(line,))
    assert verdict.resolved == {"kernel check": f"not compared; {line}"}
    assert capsys.readouterr().err == f"warning: {line}\n"


# Compilation ahead of time


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """Results of the launches of each compilation. Nothing is compiled."""
    made: list[list[Any]] = []

    def compile_ahead(work: list[Any], *, processes: int, progress: Any) -> Report:
        made.append([launch() for launch in work])
        return Report(total=3, compiled=2, cached=1, seconds=1.0, problem="one thing failed")

    monkeypatch.setattr("fat.kernels.prefill.compile_ahead.compile_ahead", compile_ahead)
    return made


def test_kernels_of_the_run_and_of_the_comparison_are_compiled_together(
    model: fat.FAT,
    monkeypatch: pytest.MonkeyPatch,
    compilations: list[list[Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    pretend_kernels_run_on_cpu(monkeypatch)
    verdict = check(model, passes=[lambda: "step"])
    assert compilations == [["step", families.CONVOLUTION, families.NORM]]
    assert verdict.resolved["kernel compilation"] == "3 kernels: 2 compiled, 1 in the cache, 1.0 s"
    assert capsys.readouterr().err == "warning: one thing failed\n"


@pytest.mark.parametrize(("mode", "expected"), [("unchecked", [["step"]]), ("off", [])])
def test_unchecked_kernels_are_compiled_and_unused_ones_are_not(
    model: fat.FAT,
    monkeypatch: pytest.MonkeyPatch,
    compilations: list[list[Any]],
    mode: kernels.Mode,
    expected: list[list[str]],
) -> None:
    pretend_kernels_run_on_cpu(monkeypatch)
    monkeypatch.setattr(augment_kernels, "available", lambda device: False)
    with kernels.use(mode):
        check(model, passes=[lambda: "step"])
    assert compilations == expected


def test_an_incompatible_version_of_triton_is_a_warning_and_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fat.kernels.prefill.compile_ahead", None)
    summary, problem = kernel_check.compile_kernels([lambda: None], show_progress=False)
    assert summary == ""
    assert problem is not None
    assert problem.startswith("kernels are compiled at their first launch, not ahead of time: import of fat.kernels.")


def test_kernels_are_checked_before_they_are_timed(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compilation and check come first, because they would use up the time that 'pipeline tune' has."""
    done: list[str] = []
    monkeypatch.setattr("launch.bench.one_rank.check_training_kernels", lambda *_: done.append("checked"))
    monkeypatch.setattr("launch.tuning.command.tune_model", lambda *_, **__: done.append("measured") or {})
    tune(parse([*SMALL, "--data", str(digits)]), ("model",), ranks=1, seconds=1.0, command="", progress=Phases("tune"))
    assert done == ["checked", "measured"]


def test_every_launch_of_a_comparison_can_be_recorded(model: fat.FAT) -> None:
    """Compilation ahead of time records launches without a GPU: each case launches kernels, and none reads a value."""
    pytest.importorskip("triton")
    from fat.kernels.prefill.launches import cuda_target, record

    checks = [
        *selfcheck.cases(model, 64, torch.bfloat16),
        *augment_selfcheck.cases(augment_recipe("fat", size=64), torch.bfloat16),
    ]
    assert {family for check in checks for family in check.families} >= set(families.FAMILIES)
    for case in checks:
        assert record(case.launch, cuda_target((9, 0))), case


def test_a_run_stores_the_verdict_in_recipe_json_and_in_the_metrics(
    tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_check, "check_kernels", lambda *_, **__: KernelCheckResult(("norm",), (NORM,), 1.25))
    out = tmp_path / "run"
    assert run_command(train, *SMALL, "--data", digits, "--out", out, "--stop-after", "1") == 0
    kept = json.loads((out / "recipe.json").read_text())["kernels"]
    failed = {
        **{"family": "norm", "operator": "add_norm", "shape": "feature map 2x8x9x9", "dtype": "bfloat16"},
        "reason": REASON,
    }
    assert kept == {"checked": ["norm"], "failed": [failed], "seconds": 1.25, "warnings": [], "compilation": ""}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    (picks,) = (line for line in lines if line["kind"] == "resolved")
    assert picks["kernel check"] == "1 families compared in 1.2 s; disabled: norm"


def test_an_operator_of_a_switched_off_family_launches_no_kernels() -> None:
    """Without a GPU and the interpreter, a launch would fail."""
    x = torch.zeros(1, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    with kernels.disabled(families.GATE):
        result: Tensor = kernels.gate(x, x)
    assert torch.equal(result, x)

"""The reference implementation of the operators, the fallback of a failed family, passes the checks of the kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from fat import kernels
from fat.kernels import families, ops, reference
from tests.support.kernel_checks import (
    BF16,
    EPS,
    FP16,
    FP32,
    Case,
    Draw,
    check_add,
    check_channel_sums,
    check_depthwise,
    check_depthwise_gate,
    check_depthwise_norm,
    check_depthwise_stats,
    check_fold,
    check_gate,
    check_norm,
    check_norm_relu,
    poisoned_memory,
)

CHECKS: dict[str, Callable[[torch.dtype, Draw], None]] = {
    "depthwise": lambda dtype, draw: check_depthwise(Case(3, 1, 2, 20, 13, 9, dtype, residual=True), draw),
    "depthwise, stride 2": lambda dtype, draw: check_depthwise(Case(5, 2, 2, 17, 13, 9, dtype, bias=False), draw),
    "depthwise and gate": lambda dtype, draw: check_depthwise_gate(Case(7, 1, 1, 16, 7, 9, dtype), draw),
    "depthwise and norm": lambda dtype, draw: check_depthwise_norm(Case(9, 1, 2, 20, 7, 9, dtype), draw),
    "statistics": lambda dtype, draw: check_depthwise_stats(Case(5, 1, 2, 24, 8, 9, dtype, residual=True), draw),
    "statistics, stride 2": lambda dtype, draw: check_depthwise_stats(Case(5, 2, 3, 20, 13, 9, dtype), draw),
    "fold": lambda dtype, draw: check_fold(33, 20, dtype, draw),
    "channel sums": lambda dtype, draw: check_channel_sums((3, 20, 13, 9), dtype, draw),
    "norm and relu": lambda dtype, draw: check_norm_relu((3, 20, 13, 9), dtype, 3.0, draw),
    "gate": lambda dtype, draw: check_gate((3, 20, 13, 9), dtype, draw),
    "norm": lambda dtype, draw: check_norm((3, 20, 13, 9), dtype, 0.0, draw),
    "norm, mean of 100 standard deviations": lambda dtype, draw: check_norm((3, 20, 13, 9), dtype, 100.0, draw),
    "add": lambda dtype, draw: check_add((3, 20, 13, 9), dtype, True, draw),
    "add without drop path": lambda dtype, draw: check_add((3, 20, 13, 9), dtype, False, draw),
}


@pytest.fixture(autouse=True)
def _all_families_are_off() -> Iterator[None]:
    with kernels.disabled(*kernels.FAMILIES), poisoned_memory():
        yield


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("name", CHECKS)
def test_the_reference_is_as_exact_as_the_kernels(name: str, dtype: torch.dtype) -> None:
    """`kernel_checks` computes expected results by autograd in float64, not with `fat.kernels.reference`."""
    CHECKS[name](dtype, Draw.seeded(1, "cpu"))


def test_update_running_stats() -> None:
    draw = Draw.seeded(2, "cpu")
    mean, drift = draw.tensor(20), draw.tensor(20)
    var, new = draw.tensor(20).square(), draw.tensor(20).square()
    batches = torch.tensor(3)
    found = [mean.clone(), var.clone(), batches.clone()]
    ops.update_running_stats(*found, drift, new, 0.1, 1.25)
    torch.testing.assert_close(found, [mean + 0.1 * drift, 0.9 * var + 0.1 * 1.25 * new, batches + 1])


@pytest.mark.parametrize("name", families.OPERATORS)
def test_every_operator_has_a_reference(name: str) -> None:
    assert callable(getattr(reference, name))


def test_autocast_does_not_change_the_reference() -> None:
    draw = Draw.seeded(3, "cpu")
    x, weight = draw.map(1, 16, 5, 5, FP32), draw.tensor(16, 1, 3, 3)
    plain = ops.depthwise(x, weight, None, 1, False)
    with torch.autocast("cpu", BF16):
        assert torch.equal(ops.depthwise(x, weight, None, 1, False), plain)


def test_with_kernel_out_statistics_are_computed_from_it_without_rounding() -> None:
    draw = Draw.seeded(4, "cpu")
    x, branch, weight = draw.map(2, 16, 5, 5, BF16), draw.map(2, 16, 5, 5, BF16), draw.tensor(16)
    stored = draw.map(2, 16, 5, 5, BF16)
    total, _, mean, _ = reference.add_norm(x, branch, None, weight, weight, EPS, kernel_out=stored)
    assert torch.equal(total, x.double() + branch.double())
    torch.testing.assert_close(mean, stored.double().mean(dim=(1, 2, 3)), rtol=1e-12, atol=1e-12)


def test_a_family_is_switched_off_in_all_threads() -> None:
    from concurrent.futures import ThreadPoolExecutor

    with kernels.disabled():
        with ThreadPoolExecutor(1) as pool, kernels.disabled("norm"):
            assert pool.submit(kernels.switched_off).result() == {"norm"}
        kernels.disable("gate")
        kernels.disable("norm")
        assert kernels.switched_off() == {"gate", "norm"}
        with pytest.raises(ValueError, match="gates: unknown kernel family; expected depthwise convolution, "):
            kernels.disable("gates")
    assert kernels.switched_off() == set(kernels.FAMILIES)

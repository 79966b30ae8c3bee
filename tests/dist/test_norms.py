"""BatchNorm over ranks equals BatchNorm of the global batch: values, gradients and running statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.dist.forked import Launcher
from tests.dist.norm_run import CASES, RANKS, ROWS, global_batch, layer, stem

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
# For sums with cancellation: gradients from which a projection onto the mean is subtracted.
COARSE = {"rtol": 1e-4, "atol": 5e-4}


@pytest.fixture(scope="module")
def found(
    launch: Launcher, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[int, bool, bool], list[dict[str, torch.Tensor]]]:
    """Results of each rank, by case."""
    out = tmp_path_factory.mktemp("norms") / "norms.pt"
    launch("tests.dist.norm_run", out, ranks=RANKS)
    return dict(zip(CASES, torch.load(out, weights_only=True), strict=True))


def expected(ranks: range) -> dict[str, Any]:
    """Return the results of PyTorch's BatchNorm on all rows of these ranks, in float64."""
    rows = slice(ranks.start * ROWS, ranks.stop * ROWS)
    images, cotangent = (t[rows].double() for t in global_batch(RANKS))
    images.requires_grad_()
    model = layer().double()
    norm, after = model
    output = model(images)
    output.backward(cotangent)
    again, unit = images.detach().requires_grad_(), stem().double()
    rectified = F.relu(unit(again))
    rectified.backward(cotangent)
    return {
        "rectified": rectified.detach(),
        "rectified images": again.grad,
        "gain": unit.bn.weight.grad,
        "shift": unit.bn.bias.grad,
        "rectified var": unit.bn.running_var,
        "rectified mean": unit.bn.running_mean,
        "output": output.detach(),
        "images": images.grad,
        "weight": norm.weight.grad,
        "bias": norm.bias.grad,
        "behind": after.weight.grad,
        "mean": norm.running_mean,
        "var": norm.running_var,
    }


@pytest.mark.parametrize("case", CASES)
def test_a_group_of_ranks_computes_the_statistics_of_all_its_rows(
    found: dict[tuple[int, bool, bool], list[dict[str, torch.Tensor]]], case: tuple[int, bool, bool]
) -> None:
    group, _, folds = case
    tolerance = COARSE if folds else TOLERANCE
    for start in range(0, RANKS, group):
        members = found[case][start : start + group]
        reference = expected(range(start, start + group))
        for name in ("output", "images"):
            joined = torch.cat([member[name] for member in members])
            torch.testing.assert_close(joined.double(), reference[name], **tolerance)
        for name in ("rectified", "rectified images"):
            joined = torch.cat([member[name] for member in members])
            torch.testing.assert_close(joined.double(), reference[name], **COARSE)
        # Each rank has the gradient of its own rows; data parallelism sums them.
        for name in ("weight", "bias", "behind", "gain", "shift"):
            total = sum(member[name].double() for member in members)
            torch.testing.assert_close(total, reference[name], **(tolerance if name in ("weight", "bias") else COARSE))
        for member in members:
            assert int(member["batches"]) == 1
            for name in ("mean", "var", "rectified mean", "rectified var"):
                torch.testing.assert_close(member[name].double(), reference[name], **TOLERANCE)


def test_groups_have_separate_statistics(
    found: dict[tuple[int, bool, bool], list[dict[str, torch.Tensor]]],
) -> None:
    first, _, other, _ = found[2, False, False]
    assert not torch.allclose(first["mean"], other["mean"])

"""Every kernel against float64: kernel sizes, strides, odd feature maps, channels that fill no tile, dtypes."""

from __future__ import annotations

import functools

import pytest
import torch

from fat.kernels.impl import channel_sums as sums
from fat.kernels.impl import norm_relu, tiles
from tests.support.kernel_checks import (
    BF16,
    FP16,
    FP32,
    Case,
    Draw,
    check_add,
    check_attend,
    check_channel_sums,
    check_depthwise,
    check_depthwise_gate,
    check_depthwise_norm,
    check_depthwise_stats,
    check_fold,
    check_gate,
    check_norm,
    check_norm_relu,
    check_weight_gradient,
)

# All pairs of (kernel, stride), (kernel, dtype) and (size, stride) occur, and each of them with bias and residual.
# Tiles have up to 7 rows, 8 to 64 columns, and 16, 32 or 64 channels.
DEPTHWISE = [
    Case(3, 1, 2, 20, 7, 7, FP32, residual=True),
    Case(3, 1, 1, 40, 14, 14, BF16),
    Case(3, 1, 1, 16, 1, 1, FP32),
    Case(3, 1, 1, 8, 8, 65, FP16, residual=True, bias=False),
    Case(3, 2, 3, 32, 7, 7, BF16),
    Case(3, 2, 1, 24, 13, 9, FP32, bias=False),
    Case(5, 1, 1, 72, 8, 5, FP32),
    Case(5, 1, 3, 32, 7, 7, BF16, residual=True),
    Case(5, 1, 1, 5, 4, 17, FP16, bias=False),
    Case(5, 2, 1, 64, 14, 14, FP32),
    Case(5, 2, 2, 17, 13, 9, BF16),
    Case(5, 2, 1, 33, 1, 2, FP32, bias=False),
    Case(7, 1, 1, 16, 13, 9, BF16, residual=True),
    Case(7, 1, 2, 40, 4, 3, FP32, bias=False),
    Case(7, 2, 1, 10, 8, 7, FP32),
    Case(9, 1, 1, 32, 7, 7, FP32, residual=True),
    Case(9, 1, 1, 12, 8, 9, BF16),
    Case(9, 2, 1, 64, 7, 7, FP32, bias=False),
    Case(9, 2, 1, 16, 7, 9, BF16),
]


@pytest.mark.parametrize("case", DEPTHWISE, ids=str)
def test_depthwise(case: Case) -> None:
    check_depthwise(case, Draw.seeded(1, "cpu"))


# Feature maps of one block, of several blocks, and those that blocks do not fill, along both dimensions.
BLOCKS = [
    Case(3, 1, 1, 20, 14, 7, FP32),
    Case(5, 1, 2, 8, 7, 28, BF16, residual=True),
    Case(5, 2, 1, 8, 28, 14, FP32),
    Case(5, 2, 1, 20, 29, 56, FP32),
    Case(3, 2, 1, 8, 12, 27, FP16, residual=False),
    Case(7, 2, 1, 8, 14, 28, FP32, bias=False),
    Case(7, 1, 1, 8, 9, 14, FP32, residual=True),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", BLOCKS, ids=str)
@pytest.mark.parametrize("form", ["blocks", "columns"])
def test_depthwise_in_both_forms(form: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "depthwise", getattr(tiles, form))
    monkeypatch.setattr(tiles, "spread", {"blocks": tiles.spread_blocks, "columns": tiles.columns}[form])
    check_depthwise(case, Draw.seeded(11, "cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["blocks", "columns"])
def test_depthwise_gate_norm_and_statistics_in_both_forms(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "depthwise", getattr(tiles, form))
    check_depthwise_gate(Case(3, 1, 1, 20, 14, 14, FP32), Draw.seeded(12, "cpu"))
    check_depthwise_norm(Case(3, 1, 1, 40, 9, 14, FP32), Draw.seeded(13, "cpu"))
    check_depthwise_stats(Case(3, 1, 2, 8, 14, 15, BF16, residual=True), Draw.seeded(14, "cpu"))
    check_depthwise_stats(Case(5, 2, 1, 8, 14, 28, FP32), Draw.seeded(15, "cpu"))


@pytest.mark.parametrize("options", [{"rows": 3, "lanes": 2}, {"rows": 14, "most_warps": 8}], ids=str)
def test_depthwise_in_other_launch_shapes(options: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "depthwise", functools.partial(tiles.blocks, **options))
    check_depthwise(Case(3, 1, 1, 24, 14, 9, BF16, residual=True), Draw.seeded(16, "cpu"))


@pytest.mark.parametrize(
    ("queries", "keys", "heads", "dtype"),
    [
        ((2, 32, 14, 14), (7, 7), 2, BF16),
        ((2, 64, 7, 7), (7, 7), 2, FP32),
        ((1, 30, 13, 9), (3, 2), 3, FP16),
        ((1, 48, 1, 1), (1, 1), 1, BF16),
        ((3, 40, 8, 19), (8, 8), 2, FP32),
    ],
)
def test_attention(queries: tuple[int, int, int, int], keys: tuple[int, int], heads: int, dtype: torch.dtype) -> None:
    check_attend(queries, keys, heads, dtype, Draw.seeded(9, "cpu"))


@pytest.mark.parametrize(
    "case",
    [
        Case(3, 1, 2, 20, 7, 7, FP32),
        Case(5, 1, 1, 80, 4, 9, BF16, bias=False),
        Case(7, 1, 1, 16, 7, 7, BF16),
        Case(9, 1, 1, 32, 7, 7, FP32),
    ],
    ids=str,
)
def test_depthwise_gate(case: Case) -> None:
    check_depthwise_gate(case, Draw.seeded(2, "cpu"))


@pytest.mark.parametrize("case", [Case(3, 1, 2, 80, 14, 14, FP32), Case(9, 1, 1, 20, 7, 9, BF16)], ids=str)
def test_depthwise_and_norm(case: Case) -> None:
    check_depthwise_norm(case, Draw.seeded(3, "cpu"))


@pytest.mark.parametrize(
    "case",
    [
        Case(3, 2, 3, 20, 13, 9, FP32),
        Case(5, 1, 2, 72, 8, 9, BF16, residual=True),
        Case(5, 2, 1, 40, 7, 7, FP16, bias=False),
        Case(7, 1, 1, 16, 8, 5, FP32, residual=True),
    ],
    ids=str,
)
def test_depthwise_and_statistics(case: Case) -> None:
    check_depthwise_stats(case, Draw.seeded(7, "cpu"))


# Feature maps of one and of several tiles of 14 rows, of one and of several patches, which fill them or not.
FORMS = [
    Case(3, 1, 2, 20, 16, 9, FP32),
    Case(3, 1, 9, 8, 7, 7, BF16),
    Case(5, 1, 3, 17, 15, 4, BF16),
    Case(5, 2, 3, 8, 15, 14, FP32),
    Case(7, 1, 1, 12, 9, 8, FP16),
    Case(9, 1, 2, 8, 7, 7, FP32),
]


@pytest.mark.parametrize("case", FORMS, ids=str)
@pytest.mark.parametrize("form", ["strips", "patches"])
def test_weight_gradient_in_both_forms(form: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """With few parts, so that each part has several tiles and the last part has fewer."""
    monkeypatch.setattr(tiles, "weight_gradient", getattr(tiles, form))
    monkeypatch.setattr(tiles, "PROGRAMS", 8)
    monkeypatch.setattr(tiles, "MULTIPROCESSORS", 1)
    check_weight_gradient(case, Draw.seeded(9, "cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("case", [Case(5, 2, 1, 8, 31, 9, FP32), Case(9, 1, 1, 8, 15, 3, BF16)], ids=str)
@pytest.mark.parametrize("form", ["strips", "patches"])
def test_statistics_gradient_in_both_forms(form: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "weight_gradient", getattr(tiles, form))
    monkeypatch.setattr(tiles, "PROGRAMS", 8)
    monkeypatch.setattr(tiles, "MULTIPROCESSORS", 1)
    check_depthwise_stats(case, Draw.seeded(10, "cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("walk", [tiles.Walk(2, 2, False, 1), tiles.Walk(1, 2, True, 1)], ids=str)
@pytest.mark.parametrize(
    "case", [Case(3, 1, 2, 20, 16, 9, FP32), Case(5, 2, 3, 8, 15, 14, FP32), Case(9, 1, 2, 8, 7, 7, BF16)], ids=str
)
def test_statistics_gradient_in_other_walks(case: Case, walk: tiles.Walk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of rows that are loaded at once does not divide the feature map."""
    monkeypatch.setattr(tiles, "walks", lambda *_: (walk,))
    monkeypatch.setattr(tiles, "patches", tiles.patches.__wrapped__)  # without its cache
    monkeypatch.setattr(tiles, "MULTIPROCESSORS", 1)
    check_depthwise_stats(case, Draw.seeded(11, "cpu"))


@pytest.mark.parametrize(("outputs", "channels", "dtype"), [(5, 20, FP32), (40, 72, BF16), (33, 16, FP16)])
def test_fold(outputs, channels, dtype) -> None:
    check_fold(outputs, channels, dtype, Draw.seeded(8, "cpu"))


MAPS = [
    ((1, 32, 7, 7), FP32),
    ((3, 20, 13, 9), BF16),
    ((2, 80, 14, 14), FP32),
    ((2, 7, 3, 5), FP16),
    ((1, 512, 1, 1), BF16),
]


@pytest.mark.parametrize(("shape", "dtype"), MAPS)
def test_gate(shape, dtype) -> None:
    check_gate(shape, dtype, Draw.seeded(4, "cpu"))


@pytest.mark.parametrize("offset", [0.0, 100.0], ids=["mean 0", "mean of 100 standard deviations"])
@pytest.mark.parametrize(("shape", "dtype"), MAPS)
def test_norm(shape, dtype, offset) -> None:
    check_norm(shape, dtype, offset, Draw.seeded(5, "cpu"))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("shape", "dtype"), MAPS)
def test_add_and_norm(shape, dtype, scaled) -> None:
    check_add(shape, dtype, scaled, Draw.seeded(6, "cpu"))


@pytest.mark.parametrize(("shape", "dtype"), [*MAPS, ((2, 160, 9, 16), BF16)])
def test_channel_sums(shape, dtype) -> None:
    check_channel_sums(shape, dtype, Draw.seeded(11, "cpu"))


@pytest.mark.parametrize("programs", [1, 3, 64])
def test_channel_sums_in_parts_of_several_iterations(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last part has fewer rows, and its last iteration is not full."""
    monkeypatch.setattr(sums, "launch_shape", sums.launch_shape.__wrapped__)
    monkeypatch.setattr(sums, "IN_FLIGHT", 512)
    monkeypatch.setattr(sums, "PROGRAMS", programs)
    check_channel_sums((3, 40, 7, 9), BF16, Draw.seeded(12, "cpu"))


@pytest.mark.parametrize("offset", [1.0, 10.0])
@pytest.mark.parametrize(("shape", "dtype"), [((2, 16, 9, 7), FP32), ((3, 20, 13, 9), BF16), ((2, 40, 14, 30), FP16)])
def test_norm_and_relu(shape, dtype, offset) -> None:
    check_norm_relu(shape, dtype, offset, Draw.seeded(13, "cpu"))


@pytest.mark.parametrize("programs", [1, 3])
def test_norm_and_relu_in_parts_of_several_iterations(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm_relu, "launch_shape", norm_relu.launch_shape.__wrapped__)
    monkeypatch.setattr(norm_relu, "IN_FLIGHT", 512)
    monkeypatch.setattr(norm_relu, "PROGRAMS", programs)
    check_norm_relu((3, 48, 7, 9), BF16, 3.0, Draw.seeded(14, "cpu"))

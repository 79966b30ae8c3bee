"""Depthwise convolutions of feature maps that are smaller than the kernel (fat/layers.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fat.layers import Depthwise, ResidualDepthwise

sides = st.integers(1, 7)


@settings(max_examples=60, deadline=None)
@given(kernel=st.sampled_from([3, 5, 7, 9]), stride=st.sampled_from([1, 2]), height=sides, width=sides)
def test_small_maps_have_the_outputs_and_gradients_of_the_whole_kernel(
    kernel: int, stride: int, height: int, width: int
) -> None:
    torch.manual_seed(0)
    layer = Depthwise(3, kernel, stride).double()
    x = torch.randn(2, 3, height, width, dtype=torch.float64, requires_grad=True)
    inputs = (x, layer.weight, layer.bias)
    ours, whole = layer(x), F.conv2d(*inputs, stride, kernel // 2, groups=3)
    grad = torch.randn_like(whole)
    torch.testing.assert_close(ours, whole, rtol=1e-12, atol=1e-13)
    gradients = zip(torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(whole, inputs, grad), strict=True)
    for found, expected in gradients:
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("side", "taps"), [(1, 1), (2, 3), (4, 7), (5, 9), (56, 9)])
def test_weights_that_meet_only_padding_are_skipped(
    side: int, taps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    used, conv2d = [], F.conv2d

    def recorded(x: torch.Tensor, weight: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        used.append(weight)
        return conv2d(x, weight, *args, **options)

    monkeypatch.setattr(F, "conv2d", recorded)
    ResidualDepthwise(2, 9)(torch.randn(1, 2, side, side))
    assert [tuple(weight.shape[2:]) for weight in used] == [(taps, taps)]


def test_an_exported_layer_does_not_depend_on_the_size_of_the_example() -> None:
    layer, side = Depthwise(2, 9).eval(), torch.export.Dim("side", min=2, max=64)
    program = torch.export.export(layer, (torch.randn(1, 2, 3, 3),), dynamic_shapes=[{2: side, 3: side}])
    x = torch.randn(1, 2, 16, 16)
    torch.testing.assert_close(program.module()(x), layer(x))

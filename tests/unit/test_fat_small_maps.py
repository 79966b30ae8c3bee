"""Convolutions of small feature maps on CPUs (fat/small_maps.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fat import small_maps
from fat.layers import Depthwise, ResidualDepthwise, pointwise

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


@pytest.mark.parametrize(("kernel", "stride", "side"), [(3, 1, 2), (5, 2, 5), (7, 1, 3)])
def test_derivatives_of_any_order_and_mode(kernel: int, stride: int, side: int) -> None:
    layer = Depthwise(2, kernel, stride).double()
    inputs = (torch.randn(2, 2, side, side).double().requires_grad_(), layer.weight, layer.bias)

    def convolve(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return small_maps.convolve(x, weight, bias, stride)

    assert small_maps.for_depthwise(inputs[0], layer.weight, stride)
    assert torch.autograd.gradcheck(convolve, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(convolve, inputs)


def test_gradients_of_each_image() -> None:
    layer, images = Depthwise(2, 5).double(), torch.randn(3, 2, 4, 4).double()
    parameters = dict(layer.named_parameters())

    def loss(parameters: dict[str, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = torch.func.functional_call(layer, parameters, image[None])
        return output.square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, images)
    for name, found in each.items():
        expected = [torch.autograd.grad(loss(parameters, image), parameters[name])[0] for image in images]
        torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.parametrize(("side", "products"), [(2, True), (4, True), (16, False)])
def test_the_weight_gradient_of_a_small_map_is_a_matrix_product(side: int, products: bool) -> None:
    layer = Depthwise(8, 5)
    x = torch.randn(2, 8, side, side).contiguous(memory_format=torch.channels_last).requires_grad_()
    output = layer(x)
    assert output.is_contiguous(memory_format=torch.channels_last)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        output.backward(torch.randn_like(output))
    names = {event.name for event in profile.events() or []}
    assert ("aten::bmm" in names) == products
    assert x.grad is not None
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("side", "product"), [(1, True), (2, True), (3, False)])
def test_pointwise_convolutions_of_the_smallest_maps_are_matrix_products(side: int, product: bool) -> None:
    layer, x = pointwise(6, 10), torch.randn(3, 6, side, side).contiguous(memory_format=torch.channels_last)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        output = layer(x)
    names = {event.name for event in profile.events() or []}
    assert ("aten::addmm" in names) == product
    assert ("aten::conv2d" in names) != product
    torch.testing.assert_close(output, F.conv2d(x, layer.weight, layer.bias))
    assert output.is_contiguous(memory_format=torch.channels_last)


def test_without_gradients_of_the_weights_the_convolution_is_pytorchs() -> None:
    layer = Depthwise(4, 3)
    x = torch.randn(1, 4, 2, 2, requires_grad=True)
    assert small_maps.for_depthwise(x, layer.weight, 1)
    assert not small_maps.for_depthwise(x, layer.weight.detach(), 1)
    assert not small_maps.for_depthwise(x.bfloat16(), layer.weight, 1)
    with torch.no_grad():
        assert not small_maps.for_depthwise(x, layer.weight, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert not small_maps.for_depthwise(x, layer.weight, 1)
        assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize(("side", "taps"), [(1, 1), (2, 3), (4, 7), (5, 9), (56, 9)])
def test_weights_that_meet_only_padding_are_skipped(side: int, taps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    used, conv2d = [], F.conv2d

    def recorded(x: torch.Tensor, weight: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        used.append(weight)
        return conv2d(x, weight, *args, **options)

    monkeypatch.setattr(F, "conv2d", recorded)
    ResidualDepthwise(2, 9)(torch.randn(1, 2, side, side)).sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        ResidualDepthwise(2, 9)(torch.randn(1, 2, side, side))
    assert [tuple(weight.shape[2:]) for weight in used] == 2 * [(taps, taps)]


def test_an_exported_layer_does_not_depend_on_the_size_of_the_example() -> None:
    layer, side = Depthwise(2, 9).eval(), torch.export.Dim("side", min=2, max=64)
    program = torch.export.export(layer, (torch.randn(1, 2, 3, 3),), dynamic_shapes=[{2: side, 3: side}])
    x = torch.randn(1, 2, 16, 16)
    torch.testing.assert_close(program.module()(x), layer(x))

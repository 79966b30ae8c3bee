"""BatchNorm folded into its neighbors computes the same as BatchNorm itself, in plain PyTorch."""

from __future__ import annotations

import copy
from functools import partial
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import fat
from fat import fused_layers
from fat.batchnorm import BatchNorm, fold_into_conv, statistics, with_statistics
from fat.blocks import ConvFFN
from fat.fused_layers import convolve_fold
from fat.layers import ConvNorm, ResidualDepthwise, depthwise, pointwise
from tests.support.tiny_fat import TINY

BF16 = torch.bfloat16


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def norm_and_pointwise(channels: int, outputs: int, dtype: torch.dtype = torch.float64) -> tuple[BatchNorm, nn.Conv2d]:
    torch.manual_seed(3)
    norm, after = BatchNorm(channels), pointwise(channels, outputs)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm.to(dtype), after.to(dtype)


def fold(norm: BatchNorm, after: nn.Conv2d, x: Tensor) -> Tensor:
    x, mean, var = with_statistics(x)
    return nn.functional.conv2d(x, *fold_into_conv(after, norm, mean, var, x.dtype))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_statistics_are_mean_and_biased_variance_per_channel(layout: torch.memory_format, dtype: torch.dtype) -> None:
    x = (drawn(1, 3, 5, 9, 7) * 0.5 + torch.arange(5).view(-1, 1, 1) * 10).to(dtype).to(memory_format=layout)
    mean, var = statistics(x)
    assert mean.dtype == var.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(mean.double(), x.double().mean(dim=(0, 2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(var.double(), x.double().var(dim=(0, 2, 3), correction=0), rtol=1e-4, atol=1e-5)


def test_folding_has_the_gradients_of_norm_and_convolution() -> None:
    norm, after = norm_and_pointwise(5, 4)
    x = (drawn(2, 3, 5, 4, 3) + 7).requires_grad_()
    cotangent = drawn(4, 3, 4, 4, 3)
    leaves = [x, *norm.parameters(), *after.parameters()]
    expected = torch.autograd.grad((after(norm(x)) * cotangent).sum(), leaves)
    found = torch.autograd.grad((fold(norm, after, x) * cotangent).sum(), leaves)
    torch.testing.assert_close(found, expected)


def test_gradients_by_finite_differences() -> None:
    norm, after = norm_and_pointwise(3, 2)
    x = drawn(5, 2, 3, 3, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: fold(norm, after, x), x)


@pytest.mark.parametrize("deviations", [0.0, 10.0, 50.0])
def test_half_precision_is_accurate_with_a_large_mean(deviations: float) -> None:
    """Channels whose mean is `deviations` standard deviations, with a running mean that is a fifth of a deviation off,
    and a gradient with a mean other than 0."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    unit, after = ConvNorm(depthwise(64, 3)).train(), pointwise(64, 16)
    with torch.no_grad():
        unit.conv.weight.mul_(3)  # so that the standard deviation of the result is about 1
        unit.conv.bias.add_(deviations)
        unit.bn.running_mean.copy_(unit.conv.bias + 0.2)
    x = drawn(6, 8, 64, 14, 14, dtype=torch.float32)
    cotangent = drawn(7, 8, 16, 14, 14) + 0.3

    def run(dtype: torch.dtype) -> list[Tensor]:
        first, second = copy.deepcopy(unit), copy.deepcopy(after)
        fold = partial(convolve_fold, fuses=True)
        call = torch.compile(fold, backend="aot_eager", fullgraph=True) if dtype == BF16 else fold
        if dtype == torch.float64:
            first, second = first.double(), second.double()
        with torch.autocast("cpu", BF16, enabled=dtype == BF16):
            out = call(first, second, x if dtype == BF16 else x.double())
        out.backward(cotangent.to(out.dtype))
        return [out.detach(), first.bn.weight.grad, first.conv.weight.grad, second.weight.grad, first.bn.running_mean]

    names = ("out", "gain", "depthwise", "pointwise", "running mean")
    for name, found, exact in zip(names, run(BF16), run(torch.float64), strict=True):
        error = (found.double() - exact).norm() / exact.norm()
        assert error < 0.02, f"{name}: {error}"


@pytest.mark.parametrize("residual", [False, True])
def test_compiled_training_folds_and_computes_the_same(residual: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    unit = ConvNorm(ResidualDepthwise(6, 3) if residual else depthwise(6, 3, stride=2)).double().train()
    after = pointwise(6, 4).double()
    x = drawn(7, 2, 6, 5, 4)
    seen: list[str] = []

    def record(graph: torch.fx.GraphModule, _: list[Tensor]) -> object:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    results = []
    fold = partial(convolve_fold, fuses=True)
    for call in (fold, torch.compile(fold, backend=record, fullgraph=True)):
        first, second = copy.deepcopy(unit), copy.deepcopy(after)
        output = call(first, second, x)
        output.square().sum().backward()
        gradients = [parameter.grad for parameter in (*first.parameters(), *second.parameters())]
        results.append([output, *gradients, *first.buffers()])
    torch.testing.assert_close(*results)
    assert not any("batch_norm" in name for name in seen)


def folds(module: nn.Module, x: Tensor) -> bool:
    """Return whether a forward pass folds BatchNorm, and assert that the result is the same."""
    expected = copy.deepcopy(module)(x)
    with (
        mock.patch("torch.compiler.is_compiling", return_value=True),
        mock.patch.object(fused_layers, "fold_into_conv", wraps=fold_into_conv) as called,
    ):
        torch.testing.assert_close(module(x), expected)
    return bool(called.called)


def test_frozen_replaced_and_hooked_modules_are_not_folded() -> None:
    """The decision is updated whenever the modules change."""
    ffn, x = ConvFFN(4, 8, 4, 3, 1).train(), drawn(8, 2, 4, 5, 5, dtype=torch.float32)
    assert folds(ffn, x)
    assert not folds(ffn.eval(), x)
    assert folds(ffn.train(), x)
    ffn.dw.bn.eval()  # frozen in training
    assert not folds(ffn, x)
    ffn.dw.bn.train()
    for module in (ffn.dw, ffn.dw.conv, ffn.dw.bn, ffn.fc2):
        hook = module.register_forward_hook(lambda *_: None)
        assert not folds(ffn, x)
        hook.remove()
    assert folds(ffn, x)
    ffn.dw.bn.momentum = None  # a cumulative average, which folding does not support
    assert not folds(ffn, x)
    ffn.dw.bn.momentum = 0.1
    norm, after = ffn.dw.bn, ffn.fc2
    ffn.fc2 = nn.Sequential(after)  # such as an adapter
    assert not folds(ffn, x)
    ffn.fc2 = after
    assert folds(ffn, x)
    ffn.dw.bn = nn.BatchNorm2d(8)
    assert not folds(ffn, x)
    ffn.dw.add_module("bn", norm)
    assert folds(ffn, x)
    ffn.dw.add_module("bn", nn.Identity())
    assert not folds(ffn, x)
    ffn.dw = nn.Conv2d(8, 8, 3, padding=1)
    assert not folds(ffn, x)


def test_a_single_value_per_channel_is_rejected() -> None:
    norm, _ = norm_and_pointwise(4, 4)
    with pytest.raises(ValueError, match="one value per channel"):
        norm.update_running_stats(torch.zeros(4), torch.zeros(4), 1)


def test_running_stats_are_updated_as_in_torch() -> None:
    norm, _ = norm_and_pointwise(5, 1)
    reference = nn.BatchNorm2d(5).double()
    for step in range(3):
        x = drawn(step, 4, 5, 3, 3) + step
        reference(x)
        mean, var = statistics(x)
        norm.update_running_stats(mean - norm.running_mean, var, 4 * 9)
    torch.testing.assert_close(dict(norm.named_buffers()), dict(reference.named_buffers()))


def test_a_compiled_model_has_the_gradients_of_an_eager_one() -> None:
    """The compiled model folds BatchNorm, the eager one does not."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = fat.FAT(TINY).double().train()
    images, cotangent = drawn(9, 2, 3, 64, 64), drawn(10, 2, TINY.num_classes)
    results = []
    for compiled in (False, True):
        twin = copy.deepcopy(model)
        call = torch.compile(twin, backend="aot_eager", fullgraph=True) if compiled else twin
        (call(images) * cotangent).sum().backward()
        results.append({name: p.grad for name, p in twin.named_parameters()} | dict(twin.named_buffers()))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-8)

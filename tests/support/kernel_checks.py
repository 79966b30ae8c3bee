"""Checks of every kernel against results in float64, on any device.

A result may differ by one unit in the last place of its dtype, plus a few units of fp32's. Inputs are random with a
given seed, and memory for results is filled with NaN beforehand.

The checks are used by tests/interpreted (Triton's interpreter) and tests/gpu, and for the reference implementation
(`fat.kernels.reference`) by tests/unit/test_kernel_reference.py. Expected results are computed here by autograd in
float64, independently of `fat.kernels.reference`, so that errors in the reference are detected too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fat.kernels import ops
from fat.kernels.selfcheck import comparison

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SUMMING = 2.0**-20  # tolerance for fp32 sums in another order, relative to the largest result
EPS = 1e-5


@dataclass(frozen=True)
class Case:
    """A depthwise convolution of a feature map [batch, channels, height, width]."""

    kernel: int
    stride: int
    batch: int
    channels: int
    height: int
    width: int
    dtype: torch.dtype
    residual: bool = False
    bias: bool = True

    def __str__(self) -> str:
        what = f"{self.kernel}x{self.kernel}s{self.stride}" + "+x" * self.residual + "-bias" * (not self.bias)
        return f"{what}-{self.batch}x{self.channels}x{self.height}x{self.width}-{str(self.dtype).split('.')[1]}"


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill uninitialized memory with NaN as in the self-check, and assert that this works."""
    with comparison.poisoned_memory():
        assert torch.empty(8).isnan().all()
        yield


def check_depthwise(case: Case, draw: Draw) -> None:
    """Check the result and all gradients of a depthwise convolution, and that weight gradients are deterministic."""
    x = draw.map(case.batch, case.channels, case.height, case.width, case.dtype)
    weight = draw.tensor(case.channels, 1, case.kernel, case.kernel)
    bias = draw.tensor(case.channels) if case.bias else None
    out = ops.depthwise(x, weight, bias, case.stride, case.residual)
    exact = _convolve(x.double(), weight.double(), _double(bias), case.stride, case.residual)
    expect("out", out, exact)

    gradient = draw.like(out)
    leaves = [leaf.double().requires_grad_() for leaf in (x, weight, draw.tensor(case.channels))]
    exact = _convolve(*leaves, case.stride, case.residual)
    grad_x, grad_weight, grad_bias = torch.autograd.grad(exact, leaves, gradient.double())
    size = case.height, case.width
    found = ops.depthwise_input_gradient(gradient, weight, None, *size, case.stride, case.residual)
    expect("gradient of x", found, grad_x)
    gelu_input = draw.like(x)
    (slope,) = torch.autograd.grad(F.gelu(leaf := gelu_input.double().requires_grad_()).sum(), leaf)
    found = ops.depthwise_input_gradient(gradient, weight, gelu_input, *size, case.stride, case.residual)
    expect("gradient of GELU's input", found, grad_x * slope)
    _check_weight_gradient(case, gradient, x, grad_weight, grad_bias)


def check_weight_gradient(case: Case, draw: Draw) -> None:
    """Check the weight and bias gradients of a depthwise convolution, and that they are deterministic."""
    x = draw.map(case.batch, case.channels, case.height, case.width, case.dtype)
    leaves = [draw.tensor(case.channels, 1, case.kernel, case.kernel), draw.tensor(case.channels)]
    leaves = [leaf.double().requires_grad_() for leaf in leaves]
    exact = _convolve(x.double(), *leaves, case.stride, False)
    gradient = draw.map(*exact.shape, case.dtype)
    _check_weight_gradient(case, gradient, x, *torch.autograd.grad(exact, leaves, gradient.double()))


def _check_weight_gradient(case: Case, gradient: Tensor, x: Tensor, grad_weight: Tensor, grad_bias: Tensor) -> None:
    found, again = (ops.depthwise_weight_gradient(gradient, x, case.kernel, case.stride) for _ in range(2))
    expect("gradient of weight", found[0], grad_weight)
    expect("gradient of bias", found[1], grad_bias)
    assert torch.equal(found[0], again[0])
    assert torch.equal(found[1], again[1])


def check_depthwise_stats(case: Case, draw: Draw) -> None:
    """Check a depthwise convolution, the statistics of its stored result, and that gradients are right and
    deterministic."""
    x = draw.map(case.batch, case.channels, case.height, case.width, case.dtype)
    weight = draw.tensor(case.channels, 1, case.kernel, case.kernel)
    bias = 5 * draw.tensor(case.channels) if case.bias else None  # means of several standard deviations
    out, mean, var = ops.depthwise_stats(x, None, weight, bias, case.stride, case.residual)
    exact = _convolve(x.double(), weight.double(), _double(bias), case.stride, case.residual)
    expect("out", out, exact)
    stored = out.double()
    size = stored.square().mean()
    expect("mean", mean, stored.mean(dim=(0, 2, 3)))
    expect("var", var, stored.var(dim=(0, 2, 3), correction=0), SUMMING * (1 + size.item()))

    count = out.numel() // case.channels
    gradient, grad_mean, grad_var = draw.like(out), draw.tensor(case.channels), draw.tensor(case.channels)
    leaf = stored.clone().requires_grad_()
    stats = leaf.mean(dim=(0, 2, 3)), leaf.var(dim=(0, 2, 3), correction=0)
    scaled = count * grad_mean, count * grad_var  # as large as the gradient of the result
    cotangents = [gradient.double(), *(cotangent.double() for cotangent in scaled)]
    (completed,) = torch.autograd.grad([leaf * 1, *stats], leaf, cotangents)
    leaves = [leaf.double().requires_grad_() for leaf in (x, weight, draw.tensor(case.channels))]
    exact = _convolve(*leaves, case.stride, case.residual)
    _, grad_weight, grad_bias = torch.autograd.grad(exact, leaves, completed)
    found = [
        ops.depthwise_stats_gradient(gradient, x, out, mean, *scaled, case.kernel, case.stride) for _ in range(2)
    ]
    names = ("gradient of output", "gradient of weight", "gradient of bias")
    for name, actual, again, expected in zip(names, *found, (completed, grad_weight, grad_bias), strict=True):
        expect(name, actual, expected, 4 * SUMMING * (1 + size.item()))
        assert torch.equal(actual, again)


def check_fold(outputs: int, channels: int, dtype: torch.dtype, draw: Draw) -> None:
    """Check a 1x1 convolution into which BatchNorm is folded against the two layers, and its gradients."""
    weight, bias = draw.tensor(outputs, channels, 1, 1), draw.tensor(outputs)
    gain, shift, mean = (draw.tensor(channels) for _ in range(3))
    var = draw.tensor(channels).square() + 0.1
    folded, folded_bias = ops.fold(weight, bias, gain, shift, mean, var, EPS, dtype)
    leaves = [t.double().requires_grad_() for t in (weight, gain, shift, mean, var)]
    exact = leaves[0] * (leaves[1] * (leaves[4] + EPS).rsqrt()).view(1, -1, 1, 1)
    expect("weights", folded, exact)
    # The bias is computed from the rounded weights, but its gradients are those of exact weights.
    rounded = exact + (folded.double() - exact).detach()
    exact_bias = bias.double() + (leaves[0].flatten(1) * leaves[2] - rounded.flatten(1) * leaves[3]).sum(1)
    expect("bias", folded_bias, exact_bias)

    grad_folded, grad_bias = draw.tensor(outputs, channels, 1, 1).to(dtype), draw.tensor(outputs).to(dtype)
    gradients = torch.autograd.grad([exact, exact_bias], leaves, [grad_folded.double(), grad_bias.double()])
    found = ops.fold_gradient(grad_folded, grad_bias, weight, gain, shift, mean, var, folded, EPS)
    for name, actual, expected in zip(("weight", "gain", "shift", "mean", "var"), found, gradients, strict=True):
        expect(f"gradient of {name}", actual, expected, 2 * SUMMING)  # one of them cubes rsqrt, an approximation


def check_depthwise_gate(case: Case, draw: Draw) -> None:
    q, other = (draw.map(case.batch, case.channels, case.height, case.width, case.dtype) for _ in range(2))
    weight = draw.tensor(case.channels, 1, case.kernel, case.kernel) / case.kernel
    bias = draw.tensor(case.channels) if case.bias else None
    local = _convolve(q.double(), weight.double(), _double(bias), 1, False)
    _check_gate(
        local,
        other,
        draw,
        lambda: ops.depthwise_gate(q, weight, bias, other),
        lambda gradient: ops.depthwise_gate_gradient(gradient, q, weight, bias, other),
    )


def check_gate(shape: tuple[int, int, int, int], dtype: torch.dtype, draw: Draw) -> None:
    local, other = draw.map(*shape, dtype), draw.map(*shape, dtype)
    _check_gate(
        local, other, draw, lambda: ops.gate(local, other), lambda gradient: ops.gate_gradient(gradient, local, other)
    )


def _check_gate(
    local: Tensor, other: Tensor, draw: Draw, forward: Callable[[], Tensor], backward: Callable[[Tensor], Any]
) -> None:
    leaves = [local.double().requires_grad_(), other.double().requires_grad_()]
    exact = F.silu(leaves[0]) * F.silu(leaves[1])
    out = forward()
    expect("out", out, exact)
    gradient = draw.like(out)
    grad_local, grad_other = torch.autograd.grad(exact, leaves, gradient.double())
    found = backward(gradient)
    expect("gradient of local", found[0], grad_local)
    expect("gradient of other", found[1], grad_other)


def check_attend(
    queries: tuple[int, int, int, int], keys: tuple[int, int], heads: int, dtype: torch.dtype, draw: Draw
) -> None:
    """Check attention and its gradients, and that the gradients are deterministic."""
    batch, channels = queries[:2]
    q, kv = draw.map(*queries, dtype), draw.map(batch, 2 * channels, *keys, dtype)
    scale = (channels // heads) ** -0.5
    leaves = [q.double().requires_grad_(), kv.double().requires_grad_()]
    split = [x.flatten(2).view(batch, heads, channels // heads, -1).mT for x in (leaves[0], *leaves[1].chunk(2, 1))]
    exact = F.scaled_dot_product_attention(*split).mT.reshape(q.shape)
    out = ops.attend(q, kv, heads, scale)
    expect("out", out, exact, 4 * SUMMING)  # exponentials are approximated
    gradient = draw.like(out)
    gradients = torch.autograd.grad(exact, leaves, gradient.double())
    found, again = (ops.attend_gradient(gradient, q, kv, heads, scale) for _ in range(2))
    for name, actual, repeated, expected in zip(("q", "kv"), found, again, gradients, strict=True):
        expect(f"gradient of {name}", actual, expected, 4 * SUMMING)
        assert torch.equal(actual, repeated)


def check_norm(shape: tuple[int, int, int, int], dtype: torch.dtype, offset: float, draw: Draw) -> None:
    """Check GroupNorm and its gradients. offset: mean of x in standard deviations."""
    x = (draw.map(*shape, dtype) + offset).contiguous(memory_format=torch.channels_last)
    weight, bias = draw.tensor(shape[1]), draw.tensor(shape[1])
    out, mean, rstd = ops.norm(x, weight, bias, EPS)
    _check_normalized(x, (out, mean, rstd), weight, bias, offset)

    gradient, residual = draw.like(x), draw.like(x)
    leaves = [leaf.double().requires_grad_() for leaf in (x, weight, bias)]
    grad_x, grad_weight, grad_bias = torch.autograd.grad(_norm(*leaves), leaves, gradient.double())
    slack = SUMMING * (1 + offset)
    found, affine = ops.norm_gradient(gradient, x, mean, rstd, weight, None)
    expect("gradient of x", found, grad_x, slack)
    expect("gradient of weight", affine[0], grad_weight, slack)
    expect("gradient of bias", affine[1], grad_bias)
    found, _ = ops.norm_gradient(gradient, x, mean, rstd, weight, residual)
    expect("gradient of x plus residual", found, grad_x + residual.double(), slack)
    scale = draw.scale(shape[0])
    total, branch, _ = ops.add_norm_gradient(gradient, x, mean, rstd, weight, residual, scale, FP32)
    assert torch.equal(total, found)
    expect("gradient of branch", branch, (grad_x + residual.double()) * scale.double().view(-1, 1, 1, 1), slack)


def check_add(shape: tuple[int, int, int, int], dtype: torch.dtype, scaled: bool, draw: Draw) -> None:
    """Check the residual add, and the norm of its stored result."""
    x, branch = draw.map(*shape, dtype), draw.map(*shape, BF16)
    scale = draw.scale(shape[0]) if scaled else None
    weight, bias = draw.tensor(shape[1]), draw.tensor(shape[1])
    factor = 1.0 if scale is None else scale.double().view(-1, 1, 1, 1)
    exact = x.double() + factor * branch.double()
    expect("sum", ops.add(x, branch, scale), exact)
    if scale is not None:
        expect("scaled", ops.scaled(x, scale), factor * x.double())
    total, *found = ops.add_norm(x, branch, scale, weight, bias, EPS)
    expect("sum before the norm", total, exact)
    _check_normalized(total, found, weight, bias)


def check_norm_relu(shape: tuple[int, int, int, int], dtype: torch.dtype, offset: float, draw: Draw) -> None:
    """Check statistics, result and gradients of BatchNorm and ReLU, and that sums are deterministic.

    offset: mean of x in standard deviations.
    """
    x = (draw.map(*shape, dtype) + offset).contiguous(memory_format=torch.channels_last)
    weight, bias = draw.tensor(shape[1]), draw.tensor(shape[1])
    slack = 4 * SUMMING * (1 + offset**2)
    (mean, var), again = (ops.channel_stats(x) for _ in range(2))
    expect("mean", mean, x.double().mean(dim=(0, 2, 3)))
    expect("var", var, x.double().var(dim=(0, 2, 3), correction=0), slack)
    assert torch.equal(mean, again[0])
    assert torch.equal(var, again[1])

    leaves = [leaf.double().requires_grad_() for leaf in (x, weight, bias)]
    exact = F.batch_norm(leaves[0], None, None, *leaves[1:], training=True, eps=EPS)
    result = ops.norm_relu(x, weight, bias, mean, var, EPS)
    expect("result", result, exact.clamp_min(0), slack)
    gradient = draw.like(x)
    passed = gradient.double() * (result > 0)  # not the exact result: rounding may change the sign
    grad_x, grad_weight, grad_bias = torch.autograd.grad(exact, leaves, passed)
    sums, again = (ops.norm_relu_sums(gradient, x, result, mean, var, EPS) for _ in range(2))
    expect("gradient of bias", sums[0], grad_bias)
    expect("gradient of weight", sums[1], grad_weight, slack)
    assert torch.equal(sums, again)
    count = x.numel() // shape[1]
    found = ops.norm_relu_gradient(gradient, x, result, weight, mean, var, *sums, count, EPS)
    expect("gradient of x", found, grad_x, slack)


def check_channel_sums(shape: tuple[int, int, int, int], dtype: torch.dtype, draw: Draw) -> None:
    """Check channel sums in fp32 and in x's dtype, and that they are deterministic."""
    x = (draw.map(*shape, dtype) + 0.5).contiguous(memory_format=torch.channels_last)
    for result_dtype in (FP32, dtype):
        found, again = (ops.channel_sums(x, result_dtype) for _ in range(2))
        assert found.dtype == result_dtype
        expect("sums", found, x.double().sum(dim=(0, 2, 3)))
        assert torch.equal(found, again)


def check_depthwise_norm(case: Case, draw: Draw) -> None:
    """Check a depthwise convolution, and the norm of its stored result."""
    x = draw.map(case.batch, case.channels, case.height, case.width, case.dtype)
    weight = draw.tensor(case.channels, 1, case.kernel, case.kernel)
    bias, norm_weight, norm_bias = (draw.tensor(case.channels) for _ in range(3))
    total, *found = ops.depthwise_norm(x, weight, bias, norm_weight, norm_bias, EPS)
    expect("output", total, _convolve(x.double(), weight.double(), bias.double(), 1, True))
    _check_normalized(total, found, norm_weight, norm_bias)


def _check_normalized(x: Tensor, found: Sequence[Tensor], weight: Tensor, bias: Tensor, offset: float = 0.0) -> None:
    out, mean, rstd = found
    slack = SUMMING * (1 + offset)  # the norm magnifies the rounding of x
    expect("normalized", out, _norm(x.double(), weight.double(), bias.double()), slack)
    expect("mean", mean, x.double().mean(dim=(1, 2, 3)), slack)
    expect("rstd", rstd, (x.double().var(dim=(1, 2, 3), correction=0) + EPS).rsqrt(), slack)


def expect(what: str, actual: Tensor, exact: Tensor, slack: float = SUMMING) -> None:
    """Assert that a result has the shape, memory format (channels-last) and values of `exact`, within the tolerance.

    slack: tolerance relative to the largest result, in addition to one unit in the last place.
    """
    assert actual.shape == exact.shape
    if actual.ndim == 4:  # also holds for depthwise weights, which are contiguous and channels-last
        assert actual.is_contiguous(memory_format=torch.channels_last), f"{what}: strides {actual.stride()}"
    exact = exact.detach()
    allowed = torch.finfo(actual.dtype).eps * exact.abs() + slack * exact.abs().max()
    off = (actual.double() - exact).abs()
    assert not actual.isnan().any(), f"{what}: {actual.isnan().sum()} of {actual.numel()} are NaN"
    worst = (off / allowed.clamp_min(1e-300)).max().item()
    assert (off <= allowed).all(), f"{what}: error is {worst:.2f} times the tolerance"


@dataclass(frozen=True)
class Draw:
    """Draws normally distributed tensors from one generator, on one device."""

    device: str
    generator: torch.Generator

    @classmethod
    def seeded(cls, seed: int, device: str) -> Draw:
        return cls(device, torch.Generator().manual_seed(seed))

    def tensor(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device)

    def map(self, batch: int, channels: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
        drawn = self.tensor(batch, channels, height, width).to(dtype)
        return drawn.contiguous(memory_format=torch.channels_last)

    def like(self, x: Tensor) -> Tensor:
        return self.tensor(*x.shape).to(x.dtype).contiguous(memory_format=torch.channels_last)

    def scale(self, batch: int) -> Tensor:
        """Return drop path's factors [batch]: every third sample is dropped."""
        return torch.tensor([0.0, 1.25, 1.25], device=self.device).repeat(batch)[:batch]


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, residual: bool) -> Tensor:
    out = F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2, groups=x.shape[1])
    return x + out if residual else out


def _norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.group_norm(x, 1, weight, bias, EPS)


def _double(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.double()

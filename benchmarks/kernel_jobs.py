"""The comparisons of `benchmarks/kernels.py`: every Triton kernel, at FAT's shapes, with its PyTorch equivalents."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from fat.blocks import POOL_KERNEL
from fat.config import VARIANTS
from fat.fused_layers import convolve_fold
from fat.kernels import Mode, ops, use
from fat.kernels.impl import tiles
from fat.layers import ConvNorm, ResidualDepthwise, pointwise

Ways = dict[str, Callable[[], object]]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
MANY_LAUNCHES = 20_000_000  # clock cycles (10 ms): enough for about 60 launches of a forward and backward pass
OTHER_FORM = "other form"


@dataclass(frozen=True)
class Job:
    """One kernel at one shape, with the implementations to compare and its minimum memory traffic in bytes."""

    name: str
    shape: tuple[int, int, int, int]
    bytes: int
    ways: Ways
    head_start: int = 0
    """Minimum clock cycles for which the device waits while the host launches the job."""
    trains: bool = True
    """Whether a training step launches the kernel at this shape."""


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """Yield the jobs of all variants and stages, each shape once."""
    seen: set[tuple[str, tuple[int, ...]]] = set()
    for variant, stage in itertools.product(options.variants, options.stages):
        config = VARIANTS[variant]
        side, width, kernel = options.size >> (stage + 1), config.widths[stage - 1], config.kernels[stage - 1]
        hidden = width * config.ffn_ratio
        shape, wide = (options.batch, width, side, side), (options.batch, hidden, side, side)
        dtype = getattr(torch, options.dtype)
        found = {
            ("position", shape): depthwise_jobs(shape, kernel, 1, dtype, normed=False),
            ("feed-forward", wide): depthwise_jobs(wide, config.ffn_kernel, 1, dtype),
            ("batch norm", wide): norm_of_the_batch_jobs(wide, config.ffn_kernel, width, dtype),
            ("gate", shape): gate_jobs(shape, kernel, dtype),
            ("norm", shape): norm_jobs(shape, dtype),
            ("attention", shape): attention_jobs(
                shape, side // config.windows[stage - 1], config.heads[stage - 1], dtype
            ),
            ("bias", shape): bias_jobs(shape, dtype),
            ("bias", wide): bias_jobs(wide, dtype),
        }
        if stage == 1:
            found["stem", shape] = stem_jobs(shape, dtype)
            larger = (options.batch, width // 2, 2 * side, 2 * side)
            found["stem", larger] = stem_jobs(larger, dtype)
        if config.windows[stage - 1] > 1:
            found["pool", shape] = depthwise_jobs(shape, POOL_KERNEL, 2, dtype)
        for key, some in found.items():
            if key not in seen:
                seen.add(key)
                yield from some


def depthwise_jobs(
    shape: tuple[int, int, int, int], kernel: int, stride: int, dtype: torch.dtype, *, normed: bool = True
) -> Iterator[Job]:
    """Yield jobs of a depthwise convolution and its gradients; at stride 1, all compute x + depthwise(x).

    Args:
        normed: whether a BatchNorm follows this convolution in FAT.
    """
    _, channels, height, width = shape
    residual = stride == 1
    x, bias = feature_maps(shape, dtype), rand(channels)
    weight = torch.randn(channels, 1, kernel, kernel, device=DEVICE)
    out = ops.depthwise(x, weight, bias, stride, residual)
    gradient = feature_maps(tuple(out.shape), dtype)
    half, half_bias = weight.to(dtype), bias.to(dtype)
    size, small = x.numel() * x.element_size(), out.numel() * out.element_size()
    name = f"depthwise {kernel}x{kernel}" + (" s2" if stride == 2 else " + x")

    def forward(x: Tensor, weight: Tensor) -> Tensor:
        y = F.conv2d(x, weight, half_bias, stride, kernel // 2, groups=channels)
        return x + y if residual else y

    def backward(gradient: Tensor, x: Tensor, weight: Tensor, which: tuple[bool, bool, bool]) -> object:
        geometry = ([stride] * 2, [kernel // 2] * 2, [1, 1], False, [0, 0], channels)
        found = torch.ops.aten.convolution_backward(gradient, x, weight, [channels], *geometry, which)
        return found[0] + gradient if residual and which[0] else found

    def ways(ours: Callable[[], object], library: Callable[..., object], *tensors: Tensor) -> Ways:
        plain = [tensor.contiguous() for tensor in tensors]
        last = [tensor.contiguous(memory_format=torch.channels_last) for tensor in tensors]
        return {"ours": ours, "channels-last": lambda: library(*last), "contiguous": lambda: library(*plain)}

    own = ways(lambda: ops.depthwise(x, weight, bias, stride, residual), forward, x, half)
    if stride == 2:
        own[OTHER_FORM] = in_the_other_form(lambda: ops.depthwise(x, weight, bias, stride, residual))
    yield Job(name, shape, size + small, own)
    yield Job(
        f"{name} input gradient",
        shape,
        size + small,
        ways(
            lambda: ops.depthwise_input_gradient(gradient, weight, None, height, width, stride, residual),
            lambda g, x, w: backward(g, x, w, (True, False, False)),
            gradient,
            x,
            half,
        ),
    )
    yield Job(
        f"{name} weight gradient",
        shape,
        size + small,
        {
            **ways(
                lambda: ops.depthwise_weight_gradient(gradient, x, kernel, stride),
                lambda g, x, w: backward(g, x, w, (False, True, True)),
                gradient,
                x,
                half,
            ),
            OTHER_FORM: in_the_other_form(lambda: ops.depthwise_weight_gradient(gradient, x, kernel, stride)),
        },
        trains=not normed,
    )

    def completed() -> object:
        return ops.depthwise_stats_gradient(gradient, x, out, bias, bias, bias, kernel, stride)

    own = {"ours": completed, OTHER_FORM: in_the_other_form(completed)}
    yield Job(f"{name} weight gradient + statistics", shape, size + 3 * small, own, trains=normed)


def in_the_other_form(call: Callable[[], object]) -> Callable[[], object]:
    """Wrap a call so that it uses the form of the weight gradient that `fat.kernels.impl.tiles` does not choose, and,
    in the forward pass at stride 2, as many channels per thread as at stride 1."""
    depthwise = tiles.depthwise

    def other(kernel: int, stride: int, height: int, width: int, channels: int) -> tiles.Strips | tiles.Patches:
        form = tiles.patches if (kernel, stride, width) in tiles.STRIPS else tiles.strips
        return form(kernel, stride, height, width, channels)

    def run() -> object:
        without_stride = mock.patch.object(tiles, "depthwise", lambda *shape: depthwise(*shape[:4]))
        with mock.patch.object(tiles, "weight_gradient", other), without_stride:
            return call()

    return run


def weight_forms(call: Callable[[], object]) -> Iterator[tuple[tiles.Patches, Callable[[], object]]]:
    """Yield each launch configuration of the weight gradient that `call` computes, and `call` wrapped to use it."""
    chosen = tiles.weight_gradient
    with mock.patch.object(tiles, "weight_gradient", wraps=chosen) as recorded:
        call()
    for form in tiles.other_patches(*recorded.call_args.args):

        def run(form: tiles.Patches = form) -> object:
            with mock.patch.object(tiles, "weight_gradient", return_value=form):
                return call()

        yield form, run


def norm_of_the_batch_jobs(
    shape: tuple[int, int, int, int], kernel: int, outputs: int, dtype: torch.dtype
) -> Iterator[Job]:
    """Yield the job of a feed-forward from GELU's input to the second 1x1 convolution's output, forward and backward.
    BatchNorm cannot be timed separately, because the adjacent kernels do its work."""
    channels = shape[1]
    torch.manual_seed(0)
    unit = ConvNorm(ResidualDepthwise(channels, kernel)).to(DEVICE).train()
    after = pointwise(channels, outputs).to(DEVICE)
    x, size = feature_maps(shape, dtype), shape[0] * channels * shape[2] * shape[3] * dtype.itemsize
    gradient = feature_maps((shape[0], outputs, *shape[2:]), dtype)
    small = gradient.numel() * gradient.element_size()

    def step(mode: Mode, x: Tensor, gradient: Tensor) -> None:
        leaf = x.detach().requires_grad_()
        with use(mode), torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            out = convolve_fold(unit, after, leaf, fuses=True, gelu=True)
        out.backward(gradient)

    yield Job(
        f"GELU, depthwise {kernel}x{kernel} + x, BatchNorm, 1x1: both ways",
        shape,
        # Forward: input read; GELU's output and the convolution's output written and read. Backward: gradient of the
        # 1x1 convolution written and read; convolution's output, GELU's output and input read; result written.
        11 * size + 3 * small,
        {
            "ours": lambda: step("auto", x, gradient),
            "channels-last": lambda: step("off", x, gradient),
            "contiguous": lambda: step("off", x.contiguous(), gradient.contiguous()),
        },
        head_start=MANY_LAUNCHES,
    )


def gate_jobs(shape: tuple[int, int, int, int], kernel: int, dtype: torch.dtype) -> Iterator[Job]:
    channels = shape[1]
    q, other, gradient = (feature_maps(shape, dtype) for _ in range(3))
    weight, bias = torch.randn(channels, 1, kernel, kernel, device=DEVICE), rand(channels)
    half, half_bias = weight.to(dtype), bias.to(dtype)
    size = q.numel() * q.element_size()

    def local() -> Tensor:
        return F.silu(F.conv2d(q, half, half_bias, 1, kernel // 2, groups=channels)) * F.silu(other)

    yield Job(
        "gate", shape, 3 * size, {"ours": lambda: ops.gate(q, other), "channels-last": lambda: silu_gate(q, other)}
    )
    own = {
        "ours": lambda: ops.gate_gradient(gradient, q, other),
        "channels-last": backward_of(silu_gate, q, other, gradient),
    }
    yield Job("gate gradient", shape, 5 * size, own)
    own = {"ours": lambda: ops.depthwise_gate(q, weight, bias, other), "channels-last": local}
    yield Job(f"depthwise {kernel}x{kernel} and gate", shape, 3 * size, own)
    own = {"ours": lambda: ops.depthwise_gate_gradient(gradient, q, weight, bias, other)}
    yield Job(f"depthwise {kernel}x{kernel} and gate, gradient", shape, 5 * size, own)


def attention_jobs(shape: tuple[int, int, int, int], keys: int, heads: int, dtype: torch.dtype) -> Iterator[Job]:
    """Yield jobs of attention from every position to `keys` x `keys` keys and values."""
    batch, channels = shape[:2]
    q, gradient = feature_maps(shape, dtype), feature_maps(shape, dtype)
    kv = feature_maps((batch, 2 * channels, keys, keys), dtype)
    scale = (channels // heads) ** -0.5
    size, small = q.numel() * q.element_size(), kv.numel() * kv.element_size()

    def library(q: Tensor, kv: Tensor) -> Tensor:
        query, key, value = (
            x.flatten(2).transpose(1, 2).unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, *kv.chunk(2, 1))
        )
        out = F.scaled_dot_product_attention(query, key, value, scale=scale)
        return out.transpose(1, 2).flatten(2).transpose(1, 2).unflatten(2, q.shape[-2:])

    own: Ways = {"ours": lambda: ops.attend(q, kv, heads, scale), "channels-last": lambda: library(q, kv)}
    yield Job("attention", shape, 2 * size + small, own)
    own = {
        "ours": lambda: ops.attend_gradient(gradient, q, kv, heads, scale),
        "channels-last": backward_of(library, q, kv, gradient),
    }
    yield Job("attention gradient", shape, 3 * size + 2 * small, own)


def norm_jobs(shape: tuple[int, int, int, int], dtype: torch.dtype) -> Iterator[Job]:
    batch, channels = shape[:2]
    x, branch, gradient, residual = (feature_maps(shape, dtype) for _ in range(4))
    weight, bias, scale = rand(channels), rand(channels), torch.full((batch,), 1.1, device=DEVICE)
    size = x.numel() * x.element_size()
    _, mean, rstd = ops.norm(x, weight, bias, EPS)
    plain = x.contiguous()
    half, half_bias = weight.to(dtype), bias.to(dtype)

    def rows(x: Tensor) -> Tensor:
        """The PyTorch implementation, which FAT uses without its kernels."""
        flat = x.permute(0, 2, 3, 1).flatten(1)
        normal = F.layer_norm(flat, flat.shape[1:], eps=EPS).view(x.permute(0, 2, 3, 1).shape)
        return torch.addcmul(half_bias, normal, half).permute(0, 3, 1, 2)

    def added() -> Tensor:
        total = torch.addcmul(x, branch, scale.to(dtype).view(-1, 1, 1, 1))
        return rows(total)

    own: Ways = {
        "ours": lambda: ops.norm(x, weight, bias, EPS),
        "channels-last": lambda: rows(x),
        "contiguous": lambda: F.group_norm(plain, 1, half, half_bias, EPS),
    }
    yield Job("norm", shape, 2 * size, own)
    own = {"ours": lambda: ops.add_norm(x, branch, scale, weight, bias, EPS), "channels-last": added}
    yield Job("add and norm", shape, 4 * size, own)
    own = {
        "ours": lambda: ops.norm_gradient(gradient, x, mean, rstd, weight, residual),
        "channels-last": backward_of(rows, x, gradient),
    }
    yield Job("norm gradient + residual", shape, 4 * size, own)


def bias_jobs(shape: tuple[int, int, int, int], dtype: torch.dtype) -> Iterator[Job]:
    gradient = feature_maps(shape, dtype)
    rows, plain = gradient.permute(0, 2, 3, 1).flatten(0, 2), gradient.contiguous()
    own: Ways = {
        "ours": lambda: ops.channel_sums(gradient, torch.float32),
        "channels-last": lambda: rows.sum(0),
        "contiguous": lambda: plain.sum((0, 2, 3)),
    }
    yield Job("bias gradient", shape, gradient.numel() * gradient.element_size(), own)


def stem_jobs(shape: tuple[int, int, int, int], dtype: torch.dtype) -> Iterator[Job]:
    """Yield jobs of BatchNorm in training mode with ReLU, as in the stem."""
    x, gradient, weight, bias = feature_maps(shape, dtype), feature_maps(shape, dtype), rand(shape[1]), rand(shape[1])
    size, count = x.numel() * x.element_size(), x.numel() // shape[1]
    mean, var = ops.channel_stats(x)
    result = ops.norm_relu(x, weight, bias, mean, var, EPS)

    def library(x: Tensor) -> Tensor:
        return F.relu(F.batch_norm(x, None, None, weight, bias, training=True, eps=EPS))

    def backward() -> Tensor:
        sums = ops.norm_relu_sums(gradient, x, result, mean, var, EPS)
        return ops.norm_relu_gradient(gradient, x, result, weight, mean, var, *sums.unbind(), count, EPS)

    own: Ways = {
        "ours": lambda: ops.norm_relu(x, weight, bias, *ops.channel_stats(x), EPS),
        "channels-last": lambda: library(x),
    }
    yield Job("batch norm and ReLU", shape, 3 * size, own)
    own = {"ours": backward, "channels-last": backward_of(library, x, gradient)}
    yield Job("batch norm and ReLU, gradient", shape, 7 * size, own)


def silu_gate(local: Tensor, other: Tensor) -> Tensor:
    return F.silu(local) * F.silu(other)


def backward_of(function: Callable[..., Tensor], *tensors: Tensor) -> Callable[[], object]:
    """Return a callable for the backward pass of `function` alone; the last tensor is the gradient of its output."""
    *inputs, cotangent = tensors
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = function(*leaves)
    return lambda: torch.autograd.grad(out, leaves, cotangent, retain_graph=True)


def feature_maps(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype).contiguous(memory_format=torch.channels_last)


def rand(channels: int) -> Tensor:
    return torch.randn(channels, device=DEVICE)

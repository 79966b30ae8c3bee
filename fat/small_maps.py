"""Convolutions of small feature maps on CPUs, as in trainings with images of 32 or 64 pixels.

1x1 convolutions of the smallest maps are matrix products. Depthwise convolutions skip weights that meet only padding,
and the gradient of their weights is a matrix product. For maps of 2 x 2 to 4 x 4, PyTorch's (oneDNN's) takes most of
the time of a training step (`benchmarks/small_maps.py` measures what is saved).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Pair = tuple[int, int]
MAX_PRODUCT = 1024
"""Largest product of input and output positions for which the weight gradient is faster by matrix products."""


def for_pointwise(x: Tensor) -> bool:
    """Return whether a 1x1 convolution of `x` is faster as a matrix product: for maps of up to 2 x 2 positions."""
    small = x.dtype == torch.float32 and x.shape[-2] * x.shape[-1] <= 4
    return _on_cpu(x) and small and not torch.is_autocast_enabled("cpu")


def for_depthwise(x: Tensor, weight: Tensor, stride: int) -> bool:
    """Return whether `convolve` is faster than PyTorch's depthwise convolution."""
    return _on_cpu(x) and (min(x.shape[-2:]) <= weight.shape[-1] // 2 or _trains(x, weight, stride))


def _on_cpu(x: Tensor) -> bool:
    """Return whether `x` is on a CPU.

    Compilers and exporters get plain convolutions, which do not depend on the size of the input.
    """
    return x.device.type == "cpu" and not (torch.compiler.is_compiling() or torch.jit.is_tracing())


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """Compute a depthwise convolution with padding k // 2.

    Args:
        x: [N, C, H, W].
        weight: [C, 1, k, k], with an odd k.
        bias: [C].

    Returns:
        [N, C, ceil(H / stride), ceil(W / stride)].
    """
    trains = _trains(x, weight, stride)
    weight, padding = _without_padding(x, weight, stride)
    if trains:
        output: Tensor = _Convolution.apply(x, weight, bias, stride, padding)
        return output
    return F.conv2d(x, weight, bias, stride, padding, groups=len(weight))


def _trains(x: Tensor, weight: Tensor, stride: int) -> bool:
    """Return whether the weights get a gradient, of a map for which matrix products are faster."""
    if not (weight.requires_grad and torch.is_grad_enabled()) or torch.is_autocast_enabled("cpu"):
        return False
    height, width = x.shape[-2:]
    outputs = -(-height // stride) * -(-width // stride)
    return x.dtype == weight.dtype in (torch.float32, torch.float64) and height * width * outputs <= MAX_PRODUCT


def _without_padding(x: Tensor, weight: Tensor, stride: int) -> tuple[Tensor, Pair]:
    """Return the weights that meet pixels, and their padding. Other products are zero, as are their gradients."""
    before = list[int]()
    for dim, side in enumerate(x.shape[-2:], 2):
        padding, last = weight.shape[dim] // 2, (side - 1) // stride * stride  # input position of the last output
        before.append(min(padding, last))
        weight = weight.narrow(dim, padding - before[-1], before[-1] + 1 + min(padding, side - 1))
    return weight, (before[0], before[1])


class _Convolution(torch.autograd.Function):
    """A depthwise convolution whose weight gradient is a matrix product.

    For each channel, the convolution is a matrix [output positions, input positions] of the weights. The gradient of
    this matrix is a product over the batch, and the gradient of a weight is the sum of the elements where it stands.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: Pair) -> Tensor:
        return F.conv2d(x, weight, bias, stride, padding, groups=len(weight))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, ctx.stride, ctx.padding = inputs
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)

    @staticmethod
    def jvp(ctx: Any, x_t: Tensor | None, weight_t: Tensor | None, bias_t: Tensor | None, *_: None) -> Tensor:
        x, weight = ctx.saved_tensors
        own = {"stride": ctx.stride, "padding": ctx.padding, "groups": len(weight)}
        output = F.conv2d(torch.zeros_like(x) if x_t is None else x_t, weight, bias_t, **own)
        return output if weight_t is None else output + F.conv2d(x, weight_t, **own)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        grad_x = grad_weight = None
        if needs_x:
            geometry = ([ctx.stride] * 2, ctx.padding, [1, 1], False, [0, 0], len(weight))
            grad_x = torch.ops.aten.convolution_backward(grad, x, weight, None, *geometry, [True, False, False])[0]
        if needs_weight:
            matrices = torch.bmm(_channels_first(grad).transpose(1, 2), _channels_first(x)).reshape(len(weight), -1)
            places = _places(x.shape[2:], grad.shape[2:], weight.shape[2:], ctx.stride, ctx.padding).to(matrices)
            grad_weight = (matrices @ places).view_as(weight)
        return grad_x, grad_weight, grad.sum((0, 2, 3)) if needs_bias else None, None, None


def _channels_first(x: Tensor) -> Tensor:
    """Copy [N, C, H, W] to [C, N, H * W]. One transposition of a matrix is several times as fast as permuting."""
    rows = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    return rows.t().contiguous().view(x.shape[1], len(x), -1)


@functools.lru_cache(maxsize=64)
def _places(inputs: Pair, outputs: Pair, kernel: Pair, stride: int, padding: Pair) -> Tensor:
    """Return [output positions * input positions, weights]: 1 where a weight multiplies the input for the output."""
    rows, columns = (
        torch.arange(inputs[dim]) - torch.arange(outputs[dim]).unsqueeze(1) * stride + padding[dim] for dim in range(2)
    )  # for each output and input: the row (column) of the weight, outside of the kernel if none
    row, column = rows[:, None, :, None], columns[None, :, None, :]
    index = torch.arange(kernel[0] * kernel[1]).view(kernel)
    inside = (row >= 0) & (row < kernel[0]) & (column >= 0) & (column < kernel[1])
    own = torch.where(inside, index[row.clamp(0, kernel[0] - 1), column.clamp(0, kernel[1] - 1)], -1)
    return (own.view(-1, 1) == index.view(1, -1)).float()

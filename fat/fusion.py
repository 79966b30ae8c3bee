"""Merge BatchNorm and residual connections into the convolutions, for faster inference."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

from fat.layers import ConvNorm, Depthwise, ResidualDepthwise
from fat.model import Trunk

Model = TypeVar("Model", bound=Trunk)


def fuse(model: Model) -> Model:
    """Return a copy of the model, in eval mode, that computes the same results with fewer operations.

    Every BatchNorm is folded into the convolution before it, and `x + depthwise(x)` into one depthwise convolution. In
    fp32 and fp64 the results differ only by rounding. Do not use the copy in half precision or under autocast: adding
    the identity to depthwise weights loses their low bits, since bf16 numbers above 1 are 2^-7 apart. A fused model
    cannot be trained further or saved as weights. Raises ValueError if the model is in half precision.
    """
    dtype = next(model.parameters()).dtype
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"model in {dtype}: fuse() expects float32 or float64 weights")
    fused = copy.deepcopy(model).eval().requires_grad_(False)
    for module in list(fused.modules()):
        for name, child in module.named_children():
            if isinstance(child, ConvNorm):
                setattr(module, name, _fold_norm(_fold_residual(child.conv), child.bn))
            elif isinstance(child, ResidualDepthwise):
                setattr(module, name, _fold_residual(child))
    return fused


def _fold_residual(conv: nn.Conv2d) -> nn.Conv2d:
    """Return x + conv(x) as one convolution, with 1 added at the center of its kernel; other convolutions unchanged."""
    if not isinstance(conv, ResidualDepthwise):
        return conv
    center = conv.kernel_size[0] // 2
    weight = conv.weight.detach().clone()
    weight[:, 0, center, center] += 1
    return _with_weights(conv, weight, conv.bias)


def _fold_norm(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> nn.Conv2d:
    """Return bn(conv(x)) as one convolution, whose weights are computed in fp64 and stored in the model's dtype."""
    assert bn.running_var is not None
    assert bn.running_mean is not None
    assert conv.bias is not None
    scale = bn.weight.double() * (bn.running_var.double() + bn.eps).rsqrt()
    bias = (conv.bias.double() - bn.running_mean.double()) * scale + bn.bias.double()
    return _with_weights(conv, conv.weight.double() * scale.view(-1, 1, 1, 1), bias)


def _with_weights(conv: nn.Conv2d, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Conv2d:
    """Return a convolution of the same geometry, device and dtype with other weights, without a residual connection."""
    plain: nn.Conv2d
    with torch.device("meta"):
        if isinstance(conv, Depthwise):
            plain = Depthwise(conv.in_channels, conv.kernel_size[0], conv.stride[0])
        else:
            plain = nn.Conv2d(
                conv.in_channels,
                conv.out_channels,
                conv.kernel_size,  # type: ignore[arg-type]
                conv.stride,  # type: ignore[arg-type]
                conv.padding,  # type: ignore[arg-type]
                groups=conv.groups,
            )
    for name, tensor in (("weight", weight), ("bias", bias)):
        assert tensor is not None
        setattr(plain, name, nn.Parameter(tensor.detach().to(conv.weight.dtype), requires_grad=False))
    return plain.eval()

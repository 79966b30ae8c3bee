"""Inference with fewer operations: BatchNorm and inner identities become part of the convolutions."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

from fat.layers import ConvNorm, Depthwise, ResidualDepthwise
from fat.model import Trunk

Model = TypeVar("Model", bound=Trunk)


def fuse(model: Model) -> Model:
    """A copy for inference, in eval mode, that computes the same with fewer operations; the model itself is left alone.

    Every BatchNorm is folded into the convolution before it, and `x + depthwise(x)` into one depthwise convolution.
    Exact but for rounding in fp32 and fp64, and meant for them: in half precision, and under autocast, an identity
    folded into depthwise weights takes their low bits (above 1 bf16's spacing is 2^-7). A fused model cannot be trained
    further or saved as weights. Raises ValueError for a model in half precision.
    """
    dtype = next(model.parameters()).dtype
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"a model in {dtype}: fusing needs float32 or float64 weights")
    fused = copy.deepcopy(model).eval().requires_grad_(False)
    for module in list(fused.modules()):
        for name, child in module.named_children():
            if isinstance(child, ConvNorm):
                setattr(module, name, _normalised(_plain(child.conv), child.bn))
            elif isinstance(child, ResidualDepthwise):
                setattr(module, name, _plain(child))
    return fused


def _plain(conv: nn.Conv2d) -> nn.Conv2d:
    """A convolution that has the identity of x + conv(x) inside, at the centre of its kernel."""
    if not isinstance(conv, ResidualDepthwise):
        return conv
    centre = conv.kernel_size[0] // 2
    weight = conv.weight.detach().clone()
    weight[:, 0, centre, centre] += 1
    return _like(conv, weight, conv.bias)


def _normalised(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> nn.Conv2d:
    """bn(conv(x)) as one convolution: worked out in fp64, kept in the model's dtype."""
    assert bn.running_var is not None
    assert bn.running_mean is not None
    assert conv.bias is not None
    scale = bn.weight.double() * (bn.running_var.double() + bn.eps).rsqrt()
    bias = (conv.bias.double() - bn.running_mean.double()) * scale + bn.bias.double()
    return _like(conv, conv.weight.double() * scale.view(-1, 1, 1, 1), bias)


def _like(conv: nn.Conv2d, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Conv2d:
    """A convolution of the same geometry, device and dtype, without what it adds."""
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

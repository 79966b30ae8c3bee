"""The layers that FAT's blocks share: convolutions by role, the map norm, stochastic depth."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def pointwise(dim: int, out_dim: int) -> nn.Conv2d:
    """1x1 convolution, with bias."""
    return nn.Conv2d(dim, out_dim, 1)


def depthwise(dim: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """Depthwise convolution, with bias; stride 2 gives ceil(n / 2)."""
    return nn.Conv2d(dim, dim, kernel, stride, padding=kernel // 2, groups=dim)


class ResidualDepthwise(nn.Conv2d):
    """x + depthwise(x). The identity is never folded into the weights of training: near 1 bf16's spacing is 2^-7."""

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__(dim, dim, kernel, padding=kernel // 2, groups=dim)

    def forward(self, input: Tensor) -> Tensor:
        return input + super().forward(input)


class ConvNorm(nn.Module):
    """A convolution and its BatchNorm: one unit, since inference makes them one convolution (`fat.fuse`)."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self.bn = nn.BatchNorm2d(conv.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class MapNorm(nn.Module):
    """GroupNorm with one group: statistics over C, H and W of each sample; affine in C.

    Works in fp32 at least, autocast or not, and returns the dtype of its weights.
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        norm = norm_rows if x.is_cuda else _group_norm
        return norm(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype), self.eps).to(self.weight.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


def _group_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.group_norm(x, 1, weight, bias, eps)


def norm_rows(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The same as a layer norm over each sample's channels-last row: torch's GroupNorm returns NCHW memory on CUDA, and
    every layer behind it would pay for that."""
    maps = x.permute(0, 2, 3, 1)
    rows = maps.flatten(1)
    maps = F.layer_norm(rows, rows.shape[1:], eps=eps).view(maps.shape)
    return torch.addcmul(bias, maps, weight).permute(0, 3, 1, 2)


class DropPath(nn.Module):
    """x + branch, with stochastic depth: while training, a sample's branch is left out with probability `drop` and
    scaled by 1 / keep otherwise (in fp32: bf16 would round that factor, a bias).

    Draws from the default generator of the device.
    """

    def __init__(self, drop: float) -> None:
        super().__init__()
        self.drop = drop

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        if self.drop == 0 or not self.training:
            return x + branch
        keep = 1 - self.drop
        dtype = torch.promote_types(x.dtype, torch.float32)
        scale = x.new_empty(x.shape[0], 1, 1, 1, dtype=dtype).bernoulli_(keep).div_(keep)
        return torch.addcmul(x, branch, scale)

    def extra_repr(self) -> str:
        return f"drop={self.drop:.4f}"

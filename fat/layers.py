"""The layers that FAT's blocks share: convolutions by role, GroupNorm with one group, stochastic depth."""

from __future__ import annotations

import abc
from typing import Any, Self, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fat import kernels
from fat.batchnorm import BatchNorm
from fat.kernels.ops.channel_sums import as_map, as_rows

Kind = TypeVar("Kind", bound=nn.Module)
MATRIX_PRODUCTS = True  # `project`'s; a switch for benchmarks


def pointwise(dim: int, out_dim: int) -> Pointwise:
    """1x1 convolution, with bias."""
    return Pointwise(dim, out_dim, 1)


def depthwise(dim: int, kernel: int, stride: int = 1) -> Depthwise:
    """Depthwise convolution, with bias; stride 2 gives ceil(n / 2)."""
    return Depthwise(dim, kernel, stride)


class Pointwise(nn.Conv2d):
    """A 1x1 convolution."""

    def forward(self, input: Tensor) -> Tensor:
        return project(input, self.weight, self.bias)


def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """1x1 convolution with weights [O, C, 1, 1]: in half precision, where our kernels serve, as a matrix product of the
    map's positions, which adds the bias on its way out; after a convolution torch adds it in a pass of its own."""
    served = MATRIX_PRODUCTS and kernels.can_use(x)
    if not served or (x.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)):
        return F.conv2d(x, weight, bias)
    if bias is not None and bias.requires_grad and torch.is_grad_enabled():
        return kernels.pointwise(x, weight, bias)
    rows, matrix = as_rows(x), weight.flatten(1).t()
    # Not F.linear, which DeepSpeed's ZeRO 3 replaces by one that keeps gathered weights.
    return as_map(rows @ matrix if bias is None else torch.addmm(bias, rows, matrix), x)


class Depthwise(nn.Conv2d):
    """A depthwise convolution, by our own kernel where that serves."""

    residual = False

    def __init__(self, dim: int, kernel: int, stride: int = 1) -> None:
        super().__init__(dim, dim, kernel, stride, padding=kernel // 2, groups=dim)
        self.has_kernel = kernel in kernels.SIZES and stride in kernels.STRIDES
        """Whether our own kernels have this size."""

    def forward(self, input: Tensor) -> Tensor:
        return self.convolve(input, self.bias)

    def convolve(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """With another bias than its own."""
        if self.has_kernel and kernels.can_use(x):
            return kernels.depthwise(x, self.weight, bias, stride=self.stride[0], residual=self.residual)
        output = self._conv_forward(x, self.weight, bias)
        return x + output if self.residual else output


class ResidualDepthwise(Depthwise):
    """x + depthwise(x).

    The identity is never folded into half-precision weights, whose spacing near 1 is 2^-7; our kernel adds it in fp32.
    """

    residual = True


class FusingModule(nn.Module, abc.ABC):
    """A module that can run some of its children as one operator (`fat.fused_layers`).

    Whether the children are of the kinds that the operator stands for is decided by the constructor, when a child is
    replaced, and in train() and eval(), not at every call. What can change without them is checked at every call:
    hooks, BatchNorm's mode, and whether the kernels take the input.
    """

    _constructed = False

    @abc.abstractmethod
    def decide_fusion(self) -> None:
        """Store which children can be fused."""

    def construct(self) -> None:
        """End the constructor: all children are there."""
        self._constructed = True
        self.decide_fusion()

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.decide_fusion()
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Module) and self._constructed:
            self.decide_fusion()

    def add_module(self, name: str, module: nn.Module | None) -> None:
        super().add_module(name, module)
        if self._constructed:
            self.decide_fusion()


class ConvNorm(FusingModule):
    """A convolution and its BatchNorm: one unit, since inference makes them one convolution (`fat.fuse`)."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self.bn = BatchNorm(conv.out_channels)
        self._kind = Depthwise if isinstance(conv, Depthwise) else nn.Conv2d
        self.construct()

    def decide_fusion(self) -> None:
        self._has_foldable_types = is_unmodified(self.conv, self._kind) and isinstance(self.bn, BatchNorm)

    @property
    def can_fold(self) -> bool:
        """Whether a neighbour can do BatchNorm's work now."""
        return self._has_foldable_types and self.bn.can_fold

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class GroupNorm1(nn.Module):
    """GroupNorm with one group: statistics over C, H and W of each sample; affine in C.

    Works in fp32 at least, autocast or not, and returns the dtype of its weights; by our own kernel, the dtype of x, or
    autocast's: every reader would round to that.
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        if kernels.can_use(x):
            return kernels.norm(x, self.weight, self.bias, self.eps)
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
        scale = self.draw(x)
        if kernels.can_use(x, branch):
            return kernels.add(x, branch, scale)
        return x + branch if scale is None else torch.addcmul(x, branch, scale.view(-1, 1, 1, 1))

    def draw(self, x: Tensor) -> Tensor | None:
        """Each sample's factor, fp32 at least, [B]; None where all are 1."""
        if self.drop == 0 or not self.training:
            return None
        keep = 1 - self.drop
        dtype = torch.promote_types(x.dtype, torch.float32)
        return x.new_empty(x.shape[0], dtype=dtype).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"drop={self.drop:.4f}"


def is_unmodified(module: object, kind: type[Kind]) -> TypeGuard[Kind]:
    """Whether a module computes what `kind` does; a module of another kind, or one derived from it, may replace it."""
    return isinstance(module, kind) and type(module).forward is kind.forward


def has_hooks(*modules: nn.Module) -> bool:
    """Whether a module has hooks, a user's or those by which ZeRO 3 gathers weights: it must be called as a module."""
    return any(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        for module in modules
    )

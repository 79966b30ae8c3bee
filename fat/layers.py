"""Layers of FAT's blocks: 1x1 and depthwise convolutions, GroupNorm with one group, stochastic depth."""

from __future__ import annotations

import abc
from typing import Any, Self, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fat import kernels, small_maps
from fat.batchnorm import BatchNorm
from fat.kernels.ops.channel_sums import as_map, as_rows

Kind = TypeVar("Kind", bound=nn.Module)
MATRIX_PRODUCTS = True  # benchmarks set this to False, so that `project` always uses a convolution


def pointwise(dim: int, out_dim: int) -> Pointwise:
    """Create a 1x1 convolution with bias."""
    return Pointwise(dim, out_dim, 1)


def depthwise(dim: int, kernel: int, stride: int = 1) -> Depthwise:
    """Create a depthwise convolution with bias; its output has ceil(n / stride) rows and columns."""
    return Depthwise(dim, kernel, stride)


class Pointwise(nn.Conv2d):
    """A 1x1 convolution."""

    def forward(self, input: Tensor) -> Tensor:
        return project(input, self.weight, self.bias)


def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute a 1x1 convolution with weights [O, C, 1, 1].

    In half precision, where FAT's kernels can be used, it is a matrix product over the positions of the feature map,
    which adds the bias without a separate pass over memory; PyTorch's convolution adds it in a second pass. It is
    also a matrix product for the smallest maps on CPUs.
    """
    if not small_maps.for_pointwise(x):
        use_kernels = MATRIX_PRODUCTS and kernels.can_use(x)
        if not use_kernels or (x.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)):
            return F.conv2d(x, weight, bias)
        if bias is not None and bias.requires_grad and torch.is_grad_enabled():
            return kernels.pointwise(x, weight, bias)
    rows, matrix = as_rows(x), weight.flatten(1).t()
    # Not F.linear: DeepSpeed's ZeRO 3 replaces it by a version that keeps the gathered weights in memory.
    return as_map(rows @ matrix if bias is None else torch.addmm(bias, rows, matrix), x)


class Depthwise(nn.Conv2d):
    """A depthwise convolution, computed by FAT's kernel where that can be used."""

    residual = False

    def __init__(self, dim: int, kernel: int, stride: int = 1) -> None:
        super().__init__(dim, dim, kernel, stride, padding=kernel // 2, groups=dim)
        self.has_kernel = kernel in kernels.SIZES and stride in kernels.STRIDES
        """Whether FAT's kernels support this kernel size and stride."""

    def forward(self, input: Tensor) -> Tensor:
        return self.convolve(input, self.bias)

    def convolve(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Compute the convolution with `bias` in place of the module's own bias."""
        if self.has_kernel and kernels.can_use(x):
            return kernels.depthwise(x, self.weight, bias, stride=self.stride[0], residual=self.residual)
        if small_maps.for_depthwise(x, self.weight, self.stride[0]):
            output = small_maps.convolve(x, self.weight, bias, self.stride[0])
        else:
            output = self._conv_forward(x, self.weight, bias)
        return x + output if self.residual else output


class ResidualDepthwise(Depthwise):
    """A depthwise convolution with a residual connection: x + depthwise(x).

    The identity is not added to half-precision weights, since bf16 numbers near 1 are 2^-7 apart; the kernel adds x in
    fp32.
    """

    residual = True


class FusingModule(nn.Module, abc.ABC):
    """A module that can run some of its children as one fused operator (`fat.fused_layers`).

    Fusing requires children of the expected classes. This is checked in the constructor, when a child is replaced, and
    in train() and eval(), because a check at every call would cost time. Conditions that can change without any of
    these are checked at every call: hooks, BatchNorm's mode, and whether the kernels accept the input.
    """

    _constructed = False

    @abc.abstractmethod
    def decide_fusion(self) -> None:
        """Store which children can be fused."""

    def finish_init(self) -> None:
        """Decide on fusion for the first time; the last statement of every subclass's constructor."""
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
    """A convolution followed by BatchNorm, which `fat.fuse` merges into one convolution for inference."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self.bn = BatchNorm(conv.out_channels)
        self._kind = Depthwise if isinstance(conv, Depthwise) else nn.Conv2d
        self.finish_init()

    def decide_fusion(self) -> None:
        self._has_foldable_types = is_unmodified(self.conv, self._kind) and isinstance(self.bn, BatchNorm)

    @property
    def can_fold(self) -> bool:
        """Whether BatchNorm can now be folded into the 1x1 convolution that follows (`fat.batchnorm`)."""
        return self._has_foldable_types and self.bn.can_fold

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class GroupNorm1(nn.Module):
    """GroupNorm with one group: statistics over C, H and W of each sample, and an affine transform per channel.

    Computes in fp32 or wider, also under autocast, and returns the dtype of its weights. FAT's kernel returns the dtype
    of x instead, or autocast's dtype, because every layer that reads the result would round to it.
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
    """Compute GroupNorm with one group as a layer norm over each sample's values in channels-last order.

    PyTorch's GroupNorm returns NCHW memory on CUDA, which would slow down every layer that follows.
    """
    nhwc = x.permute(0, 2, 3, 1)
    rows = nhwc.flatten(1)
    normalized = F.layer_norm(rows, rows.shape[1:], eps=eps).view(nhwc.shape)
    return torch.addcmul(bias, normalized, weight).permute(0, 3, 1, 2)


class DropPath(nn.Module):
    """Residual add with stochastic depth: x + branch.

    In training, each sample's branch is dropped with probability `drop` and otherwise scaled by 1 / (1 - drop). The
    factor is fp32, because rounding it to bf16 would bias the result. Random numbers come from the device's default
    generator.
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
        """Draw the factor of each sample's branch, [B], in fp32 or wider. None: all factors are 1."""
        if self.drop == 0 or not self.training:
            return None
        keep = 1 - self.drop
        dtype = torch.promote_types(x.dtype, torch.float32)
        return x.new_empty(x.shape[0], dtype=dtype).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"drop={self.drop:.4f}"


def is_unmodified(module: object, kind: type[Kind]) -> TypeGuard[Kind]:
    """Return whether a module is a `kind` whose forward is not overridden, so that it can be fused."""
    return isinstance(module, kind) and type(module).forward is kind.forward


def has_hooks(*modules: nn.Module) -> bool:
    """Return whether any module has hooks, such as those by which ZeRO 3 gathers weights.

    A module with hooks cannot be fused: it must be called for its hooks to run.
    """
    return any(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        for module in modules
    )

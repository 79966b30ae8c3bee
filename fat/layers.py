"""The layers that FAT's blocks share: convolutions by role, the map norm, stochastic depth."""

from __future__ import annotations

from typing import TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fat import kernels
from fat.batchnorm import BatchNorm, folded, with_statistics
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
    served = MATRIX_PRODUCTS and kernels.serves(x)
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

    def served(self, x: Tensor) -> bool:
        """Whether our own kernel takes x and has this size."""
        return self.kernel_size[0] in kernels.SIZES and self.stride[0] in kernels.STRIDES and kernels.serves(x)

    def forward(self, input: Tensor) -> Tensor:
        return self.convolve(input, self.bias)

    def convolve(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """With another bias than its own."""
        if self.served(x):
            return kernels.depthwise(x, self.weight, bias, stride=self.stride[0], residual=self.residual)
        output = self._conv_forward(x, self.weight, bias)
        return x + output if self.residual else output


class ResidualDepthwise(Depthwise):
    """x + depthwise(x).

    The identity is never folded into half-precision weights, whose spacing near 1 is 2^-7; our kernel adds it in fp32.
    """

    residual = True


class ConvNorm(nn.Module):
    """A convolution and its BatchNorm: one unit, since inference makes them one convolution (`fat.fuse`)."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self.bn = BatchNorm(conv.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class MapNorm(nn.Module):
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
        if kernels.serves(x):
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
        if kernels.serves(x, branch):
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


# Neighbours in one pass over memory, where our own kernels serve. `x` is read and the result written as by the modules
# one after the other.


def convolve_norm(conv: nn.Module, norm: MapNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """y = conv(x), and norm(y)."""
    if plain(conv, ResidualDepthwise) and plain(norm, MapNorm) and conv.served(x) and not watched(conv, norm):
        return kernels.depthwise_norm(x, conv.weight, conv.bias, norm.weight, norm.bias, norm.eps)
    y = conv(x)
    return y, norm(y)


def add_norm(drop_path: DropPath, norm: MapNorm, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
    """y = drop_path(x, branch), and norm(y)."""
    plainly = plain(drop_path, DropPath) and plain(norm, MapNorm)
    if plainly and kernels.serves(x, branch) and not watched(drop_path, norm):
        return kernels.add_norm(x, branch, drop_path.draw(x), norm.weight, norm.bias, norm.eps)
    y = drop_path(x, branch)
    return y, norm(y)


def convolve_gate(conv: nn.Module, q: Tensor, other: Tensor) -> Tensor:
    """SiLU(conv(q)) * SiLU(other)."""
    if kernels.serves(q, other):
        if plain(conv, Depthwise) and conv.served(q) and not watched(conv):
            return kernels.depthwise_gate(q, conv.weight, conv.bias, other)
        return kernels.gate(conv(q), other)
    return F.silu(conv(q)) * F.silu(other)


def convolve_relu(unit: nn.Module, x: Tensor) -> Tensor:
    """ReLU(unit(x)), of a dense convolution with its BatchNorm."""
    # The compiler joins what torch does by itself.
    if torch.compiler.is_compiling() or not (
        kernels.serves(x) and plain(unit, ConvNorm) and plain(unit.conv, nn.Conv2d)
    ):
        return F.relu(unit(x))
    conv, norm = unit.conv, unit.bn
    if not (isinstance(norm, BatchNorm) and norm.folds) or watched(unit, conv, norm):
        return F.relu(unit(x))
    y = conv._conv_forward(x, conv.weight, None)
    return kernels.batch_norm_relu(y.contiguous(memory_format=torch.channels_last), conv.bias, norm)


def convolve_fold(unit: nn.Module, after: nn.Module, x: Tensor, *, gelu: bool = False) -> Tensor:
    """after(unit(x)), or after(unit(GELU(x))): a depthwise convolution with its BatchNorm, and a 1x1 convolution, whose
    weights do BatchNorm's work while training (`fat.batchnorm`)."""
    served = kernels.serves(x)
    # Eager and without our kernels as many bytes would pass, by more launches.
    pays = served or torch.compiler.is_compiling()
    if not (pays and folds(unit, after)):
        result: Tensor = after(unit(F.gelu(x) if gelu else x))
        return result
    assert isinstance(unit, ConvNorm)
    assert isinstance(after, Pointwise)
    conv, norm = unit.conv, unit.bn
    assert isinstance(conv, Depthwise)
    assert isinstance(norm, BatchNorm)
    assert norm.running_mean is not None
    bias = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
    if conv.served(x):
        y, mean, var = kernels.depthwise_moments(
            x, conv.weight, bias, stride=conv.stride[0], residual=conv.residual, gelu=gelu
        )
    else:
        y, mean, var = with_statistics(conv.convolve(F.gelu(x) if gelu else x, bias))
    mean, var = norm.shared(mean, var)
    count = y.numel() // y.shape[1]
    if served:
        kernels.follow(norm, mean, var, count)
        return project(y, *kernels.fold(after, norm, mean, var, y.dtype))
    norm.follow(mean, var, count)
    return project(y, *folded(after, norm, mean, var, y.dtype))


def folds(unit: nn.Module, after: nn.Module) -> bool:
    """Whether `after` can do the work of the norm in `unit` now; other modules may stand in the place of either."""
    return (
        plain(unit, ConvNorm)
        and plain(unit.conv, Depthwise)
        and isinstance(unit.bn, BatchNorm)
        and unit.bn.folds
        and plain(after, Pointwise)
        and after.bias is not None
        and not watched(unit, unit.conv, unit.bn, after)
    )


def plain(module: object, kind: type[Kind]) -> TypeGuard[Kind]:
    """Whether it does what that kind of module does; another may stand in its place."""
    return isinstance(module, kind) and type(module).forward is kind.forward


def watched(*modules: nn.Module) -> bool:
    """Whether someone must be told when these are called: a user's hooks, or those by which ZeRO 3 gathers weights."""
    return any(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        for module in modules
    )

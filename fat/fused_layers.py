"""Neighbouring layers in one pass over memory, where our own kernels serve.

`fuses` says whether the modules are of the kinds that an operator stands for, which the module that holds them decides
beforehand (`fat.layers.FusingModule`); if they are not, they are called one after the other. `x` is read and the result
written alike either way.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fat import kernels
from fat.batchnorm import fold_into_conv, with_statistics
from fat.layers import ConvNorm, Depthwise, DropPath, GroupNorm1, Pointwise, has_hooks, is_unmodified, project


def convolve_norm(conv: Depthwise, norm: GroupNorm1, x: Tensor, *, fuses: bool) -> tuple[Tensor, Tensor]:
    """y = conv(x), which is x + depthwise(x), and norm(y)."""
    if fuses and conv.has_kernel and kernels.can_use(x) and not has_hooks(conv, norm):
        return kernels.depthwise_norm(x, conv.weight, conv.bias, norm.weight, norm.bias, norm.eps)
    y = conv(x)
    return y, norm(y)


def add_norm(drop_path: DropPath, norm: GroupNorm1, x: Tensor, branch: Tensor, *, fuses: bool) -> tuple[Tensor, Tensor]:
    """y = drop_path(x, branch), and norm(y)."""
    if fuses and kernels.can_use(x, branch) and not has_hooks(drop_path, norm):
        return kernels.add_norm(x, branch, drop_path.draw(x), norm.weight, norm.bias, norm.eps)
    y = drop_path(x, branch)
    return y, norm(y)


def convolve_gate(conv: Depthwise, q: Tensor, other: Tensor, *, fuses: bool) -> Tensor:
    """SiLU(conv(q)) * SiLU(other)."""
    if not kernels.can_use(q, other):
        return F.silu(conv(q)) * F.silu(other)
    if fuses and conv.has_kernel and not has_hooks(conv):
        return kernels.depthwise_gate(q, conv.weight, conv.bias, other)
    return kernels.gate(conv(q), other)


def convolve_relu(unit: nn.Module, x: Tensor) -> Tensor:
    """ReLU(unit(x)), of a dense convolution with its BatchNorm."""
    # The compiler joins what torch does by itself. `unit` is in a ModuleList, which does not say when it is replaced.
    if torch.compiler.is_compiling() or not (is_unmodified(unit, ConvNorm) and unit.can_fold and kernels.can_use(x)):
        return F.relu(unit(x))
    if has_hooks(unit, unit.conv, unit.bn):
        return F.relu(unit(x))
    y = unit.conv._conv_forward(x, unit.conv.weight, None)
    return kernels.batch_norm_relu(y.contiguous(memory_format=torch.channels_last), unit.conv.bias, unit.bn)


def convolve_fold(unit: ConvNorm, after: Pointwise, x: Tensor, *, fuses: bool, gelu: bool = False) -> Tensor:
    """after(unit(x)), or after(unit(GELU(x))): a depthwise convolution with its BatchNorm, and a 1x1 convolution, whose
    weights do BatchNorm's work while training (`fat.batchnorm`)."""
    served = kernels.can_use(x)
    # Eager and without our kernels as many bytes would pass, by more launches.
    pays = served or torch.compiler.is_compiling()
    if not (fuses and pays and unit.can_fold) or has_hooks(unit, unit.conv, unit.bn, after):
        result: Tensor = after(unit(F.gelu(x) if gelu else x))
        return result
    conv, norm = unit.conv, unit.bn
    assert isinstance(conv, Depthwise)
    bias = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
    if served and conv.has_kernel:
        y, mean, var = kernels.depthwise_stats(
            x, conv.weight, bias, stride=conv.stride[0], residual=conv.residual, gelu=gelu
        )
    else:
        y, mean, var = with_statistics(conv.convolve(F.gelu(x) if gelu else x, bias))
    mean, var = norm.sync_stats(mean, var)
    count = y.numel() // y.shape[1]
    if served:
        kernels.update_running_stats(norm, mean, var, count)
        return project(y, *kernels.fold(after, norm, mean, var, y.dtype))
    norm.update_running_stats(mean, var, count)
    return project(y, *fold_into_conv(after, norm, mean, var, y.dtype))


def has_foldable_norm(unit: object) -> bool:
    """Whether a module is a depthwise convolution whose BatchNorm `convolve_fold` can leave to its neighbour."""
    return is_unmodified(unit, ConvNorm) and isinstance(unit.conv, Depthwise)


def can_take_norm(after: object) -> bool:
    """Whether a module is a 1x1 convolution whose weights can do BatchNorm's work."""
    return is_unmodified(after, Pointwise) and after.bias is not None

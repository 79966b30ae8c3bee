"""Neighboring layers computed in one pass over memory, where FAT's kernels can be used.

`fuses` says whether the modules have the classes that the fused operator requires; the module that contains them
decides this in advance (`fat.layers.FusingModule`). Otherwise they are called one after the other. Inputs and results
have the same shapes and dtypes in both cases.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fat import kernels
from fat.batchnorm import fold_into_conv, with_statistics
from fat.layers import ConvNorm, Depthwise, DropPath, GroupNorm1, Pointwise, has_hooks, is_unmodified, project


def convolve_norm(conv: Depthwise, norm: GroupNorm1, x: Tensor, *, fuses: bool) -> tuple[Tensor, Tensor]:
    """Return y = conv(x), where conv is residual (x + depthwise(x)), and norm(y)."""
    if fuses and conv.has_kernel and kernels.can_use(x) and not has_hooks(conv, norm):
        return kernels.depthwise_norm(x, conv.weight, conv.bias, norm.weight, norm.bias, norm.eps)
    y = conv(x)
    return y, norm(y)


def add_norm(drop_path: DropPath, norm: GroupNorm1, x: Tensor, branch: Tensor, *, fuses: bool) -> tuple[Tensor, Tensor]:
    """Return y = drop_path(x, branch) and norm(y)."""
    if fuses and kernels.can_use(x, branch) and not has_hooks(drop_path, norm):
        return kernels.add_norm(x, branch, drop_path.draw(x), norm.weight, norm.bias, norm.eps)
    y = drop_path(x, branch)
    return y, norm(y)


def convolve_gate(conv: Depthwise, q: Tensor, other: Tensor, *, fuses: bool) -> Tensor:
    """Return SiLU(conv(q)) * SiLU(other)."""
    if not kernels.can_use(q, other):
        return F.silu(conv(q)) * F.silu(other)
    if fuses and conv.has_kernel and not has_hooks(conv):
        return kernels.depthwise_gate(q, conv.weight, conv.bias, other)
    return kernels.gate(conv(q), other)


def convolve_relu(unit: nn.Module, x: Tensor) -> Tensor:
    """Return ReLU(unit(x)), where `unit` is a dense convolution with BatchNorm."""
    # torch.compile fuses these layers itself. The class of `unit` is checked at every call, because its ModuleList does
    # not report that a child was replaced.
    if torch.compiler.is_compiling() or not (is_unmodified(unit, ConvNorm) and unit.can_fold and kernels.can_use(x)):
        return F.relu(unit(x))
    if has_hooks(unit, unit.conv, unit.bn):
        return F.relu(unit(x))
    y = unit.conv._conv_forward(x, unit.conv.weight, None)
    return kernels.batch_norm_relu(y.contiguous(memory_format=torch.channels_last), unit.conv.bias, unit.bn)


def convolve_fold(unit: ConvNorm, after: Pointwise, x: Tensor, *, fuses: bool, gelu: bool = False) -> Tensor:
    """Return after(unit(x)), or after(unit(GELU(x))), with BatchNorm folded into `after` in training (`fat.batchnorm`).

    unit: a depthwise convolution with BatchNorm. after: a 1x1 convolution.
    """
    use_kernels = kernels.can_use(x)
    # In eager mode without FAT's kernels, folding would move as many bytes as BatchNorm and launch more kernels.
    is_faster = use_kernels or torch.compiler.is_compiling()
    if not (fuses and is_faster and unit.can_fold) or has_hooks(unit, unit.conv, unit.bn, after):
        result: Tensor = after(unit(F.gelu(x) if gelu else x))
        return result
    conv, norm = unit.conv, unit.bn
    assert isinstance(conv, Depthwise)
    bias = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
    if use_kernels and conv.has_kernel:
        y, mean, var = kernels.depthwise_stats(
            x, conv.weight, bias, stride=conv.stride[0], residual=conv.residual, gelu=gelu
        )
    else:
        y, mean, var = with_statistics(conv.convolve(F.gelu(x) if gelu else x, bias))
    mean, var = norm.sync_stats(mean, var)
    count = y.numel() // y.shape[1]
    if use_kernels:
        kernels.update_running_stats(norm, mean, var, count)
        return project(y, *kernels.fold(after, norm, mean, var, y.dtype))
    norm.update_running_stats(mean, var, count)
    return project(y, *fold_into_conv(after, norm, mean, var, y.dtype))


def has_foldable_norm(unit: object) -> bool:
    """Return whether a module is a depthwise convolution whose BatchNorm `convolve_fold` can fold."""
    return is_unmodified(unit, ConvNorm) and isinstance(unit.conv, Depthwise)


def can_take_norm(after: object) -> bool:
    """Return whether a module is a 1x1 convolution into which BatchNorm can be folded."""
    return is_unmodified(after, Pointwise) and after.bias is not None

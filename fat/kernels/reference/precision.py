"""Dtypes, memory formats and broadcasting of the reference.

`kernel_out` is explained in `fat.kernels.reference`: if it is given, everything is float64 and nothing is rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fat.kernels.ops.checks import channels_last


def sum_dtype(kernel_out: Tensor | None) -> torch.dtype:
    """Return the dtype in which all sums are computed."""
    return torch.float32 if kernel_out is None else torch.float64


def as_map(result: Tensor, dtype: torch.dtype, kernel_out: Tensor | None) -> Tensor:
    """Round a feature map to dtype and copy it to channels-last memory; unchanged if `kernel_out` is given."""
    return channels_last(result.to(dtype)) if kernel_out is None else result


def as_float32(result: Tensor, kernel_out: Tensor | None) -> Tensor:
    """Round statistics or weight gradients to float32; unchanged if `kernel_out` is given."""
    return result.to(torch.float32) if kernel_out is None else result


def in_nchw(x: Tensor, wide: torch.dtype) -> Tensor:
    """Copy a feature map to NCHW memory, for which PyTorch has depthwise kernels without TF32 on every device."""
    return x.to(wide).contiguous()


def scale_samples(x: Tensor, scale: Tensor | None) -> Tensor:
    """Multiply each sample by its factor, scale [B]. None: all factors are 1."""
    return x if scale is None else x * scale.to(x.dtype).view(-1, 1, 1, 1)


def per_channel(x: Tensor) -> Tensor:
    """Reshape [C] so that it broadcasts over a feature map."""
    return x.view(-1, 1, 1)

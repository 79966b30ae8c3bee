"""Dtypes, memory formats and broadcasting of the reference.

`own` is as in `fat.kernels.reference`: with it everything is float64, and nothing is rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fat.kernels.ops.checks import channels_last


def sum_dtype(own: Tensor | None) -> torch.dtype:
    """Return the dtype of all sums."""
    return torch.float32 if own is None else torch.float64


def as_map(result: Tensor, dtype: torch.dtype, own: Tensor | None) -> Tensor:
    """Round a map, and put it into channels-last memory."""
    return channels_last(result.to(dtype)) if own is None else result


def as_float32(result: Tensor, own: Tensor | None) -> Tensor:
    """Round statistics and gradients of weights."""
    return result.to(torch.float32) if own is None else result


def in_nchw(x: Tensor, wide: torch.dtype) -> Tensor:
    """Copy a map into NCHW memory, for which torch has depthwise kernels of its own on every device, without TF32."""
    return x.to(wide).contiguous()


def scale_samples(x: Tensor, scale: Tensor | None) -> Tensor:
    """Multiply each sample of a map by its number; None = by 1."""
    return x if scale is None else x * scale.to(x.dtype).view(-1, 1, 1, 1)


def per_channel(x: Tensor) -> Tensor:
    """Make a number per channel broadcast over a map."""
    return x.view(-1, 1, 1)

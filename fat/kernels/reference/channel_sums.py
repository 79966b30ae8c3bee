"""Reference implementation of the gradient of a 1x1 convolution's bias."""

from __future__ import annotations

import torch
from torch import Tensor

from fat.kernels.reference.precision import sum_dtype


def channel_sums(x: Tensor, dtype: torch.dtype, *, kernel_out: Tensor | None = None) -> Tensor:
    found = x.sum(dim=(0, 2, 3), dtype=sum_dtype(kernel_out))
    return found.to(dtype) if kernel_out is None else found

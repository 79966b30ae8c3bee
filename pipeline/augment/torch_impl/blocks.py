"""How much of a batch is worked on at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Pixels at once. On a CPU the intermediate values (up to 300 bytes a pixel) then nearly fit the caches and, more
# important, memory that malloc keeps: a larger block is paid for in page faults. Elsewhere only memory limits it.
_CPU_BLOCK = 1 << 16
_BLOCK = 1 << 20


def by_block(work: Callable[..., Tensor], images: Tensor, *others: Tensor) -> Tensor:
    """`work(images, *others)`, where all are of n samples along dimension 0, and so is the result."""
    block = _CPU_BLOCK if images.device == torch.device("cpu") else _BLOCK
    at_once = max(1, block // (images.shape[1] * images.shape[2]))
    if len(images) <= at_once:
        return work(images, *others)
    parts = zip(images.split(at_once), *(other.split(at_once) for other in others), strict=True)
    return torch.cat([work(*part) for part in parts])

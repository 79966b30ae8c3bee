"""Process a batch in blocks of samples, to limit the memory of intermediate values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Pixels per block. On a CPU, the intermediate values (up to 300 bytes per pixel) of such a block nearly fit into the
# caches and, more importantly, into memory that malloc keeps; larger blocks cause page faults. On other devices only
# the available memory limits the size.
_CPU_BLOCK = 1 << 16
_BLOCK = 1 << 20


def by_block(work: Callable[..., Tensor], images: Tensor, *others: Tensor) -> Tensor:
    """Compute `work(images, *others)` in blocks of samples.

    All tensors, and the result, have the samples in dimension 0; `images` is [n, H, W, 3].
    """
    block = _CPU_BLOCK if images.device == torch.device("cpu") else _BLOCK
    samples = max(1, block // (images.shape[1] * images.shape[2]))
    if len(images) <= samples:
        return work(images, *others)
    parts = zip(images.split(samples), *(other.split(samples) for other in others), strict=True)
    return torch.cat([work(*part) for part in parts])

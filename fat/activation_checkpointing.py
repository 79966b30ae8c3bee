"""Activation checkpointing of a block that holds BatchNorm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from fat import kernels


def checkpoint_block(function: Callable[[Tensor], Tensor], x: Tensor, block: nn.Module) -> Tensor:
    """function(x), a part of `block`, whose inner activations the backward pass computes again instead of keeping them.

    The second forward draws the same drop path, uses our kernels as the first does, and leaves BatchNorm's running
    statistics alone, which a plain `torch.utils.checkpoint` would move twice.
    """
    if torch.compiler.is_compiling():  # a compiled backward repeats arithmetic but no update of a buffer
        compiled: Tensor = checkpoint(function, x, use_reentrant=False)
        return compiled
    mode = kernels.mode()

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _as_in_forward(block, mode)

    result: Tensor = checkpoint(function, x, use_reentrant=False, context_fn=contexts)
    return result


@contextmanager
def _as_in_forward(block: nn.Module, mode: kernels.Mode) -> Iterator[None]:
    """The mode of the first forward pass, since autograd may run this in another thread, and kept statistics."""
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:  # still given to the kernel, which must keep as many tensors as the first time
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        with kernels.use(mode):
            yield
    finally:
        for norm, (momentum, counter) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, counter

"""Activation checkpointing of blocks that contain BatchNorm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from fat import kernels


def checkpoint_block(function: Callable[[Tensor], Tensor], x: Tensor, block: nn.Module) -> Tensor:
    """Return function(x), with inner activations recomputed in the backward pass instead of being stored.

    The recomputation draws the same drop path and uses FAT's kernels in the same mode. It does not update BatchNorm's
    running statistics, which plain `torch.utils.checkpoint` would update twice.

    function: `block` or a part of it.
    """
    if torch.compiler.is_compiling():  # a compiled backward pass recomputes activations, but updates no buffers
        compiled: Tensor = checkpoint(function, x, use_reentrant=False)
        return compiled
    mode = kernels.mode()

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _recomputation(block, mode)

    result: Tensor = checkpoint(function, x, use_reentrant=False, context_fn=contexts)
    return result


@contextmanager
def _recomputation(block: nn.Module, mode: kernels.Mode) -> Iterator[None]:
    """Restore the kernels' mode of the forward pass, and keep BatchNorm's running statistics unchanged.

    The mode must be restored because autograd may run the recomputation in another thread.
    """
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:  # momentum 0, not eval mode: the recomputation must save as many tensors as the forward pass
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        with kernels.use(mode):
            yield
    finally:
        for norm, (momentum, counter) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, counter

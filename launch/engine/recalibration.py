"""Recalibration of BatchNorm: running statistics of fixed weights instead of those that training has averaged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def recalibrate(norms: Sequence[_BatchNorm], forward: Callable[[Tensor], object], batches: Iterable[Tensor]) -> None:
    """Replace running means and variances by their averages over batches, in which all batches have equal weight.

    The averages are those of `torch.optim.swa_utils.update_bn`, except that only BatchNorm is in training mode: drop
    path and dropout are off, as in the evaluations for which the statistics are meant. If the iteration raises an
    error, nothing changes.

    Args:
        norms: layers with running statistics, in a model in eval mode. They are in training mode afterwards.
        forward: runs the model on images [B, 3, H, W].
        batches: images.
    """
    momenta = [norm.momentum for norm in norms]
    before = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    for norm in norms:
        norm.train()
    try:
        for number, images in enumerate(batches, start=1):
            for norm in norms:
                if number == 1:
                    norm.reset_running_stats()
                norm.momentum = 1 / number  # not None, with which fused layers would run one by one
            forward(images)
    except BaseException:
        for buffer, value in before:
            buffer.copy_(value)
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum

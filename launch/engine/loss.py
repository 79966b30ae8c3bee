"""The loss of a micro-batch and the counts of an evaluation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.augment.pixels import mix_targets
from pipeline.loader import Batch


def soft_cross_entropy(logits: Tensor, batch: Batch, smoothing: float) -> Tensor:
    """Mean cross-entropy against smoothed (and, where rows were mixed, shared) labels; float32 scalar.

    Args:
        logits: [B, classes], any float dtype; the softmax is taken in float32.
    """
    logits = logits.float()
    if batch.lam is None:
        return F.cross_entropy(logits, batch.labels, label_smoothing=smoothing)
    targets = mix_targets(batch.labels, batch.lam, logits.shape[1], smoothing)
    return -(targets * F.log_softmax(logits, dim=1)).sum(dim=1).mean()


def count_correct(logits: Tensor, batch: Batch) -> Tensor:
    """Per row: 1, top-1 hit, top-5 hit, cross-entropy; all 0 where the mask is False. float64 [B, 4]."""
    logits = logits.float()
    hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == batch.labels[:, None]
    losses = F.cross_entropy(logits, batch.labels, reduction="none")
    rows = torch.stack([torch.ones_like(losses), hits[:, 0].float(), hits.any(dim=1).float(), losses], dim=1)
    return torch.where(batch.mask[:, None], rows, 0.0).double()

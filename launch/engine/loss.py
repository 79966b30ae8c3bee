"""The training loss of a micro-batch, and the accuracy of evaluation batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.augment.pixels import mix_targets
from pipeline.loader import Batch


def soft_cross_entropy(logits: Tensor, batch: Batch, smoothing: float) -> Tensor:
    """Return the mean cross-entropy with label smoothing and, if rows were mixed, mixed labels, as a float32 scalar.

    Args:
        logits: [B, classes], any float dtype; the softmax is computed in float32.
    """
    logits = logits.float()
    if batch.lam is None:
        return F.cross_entropy(logits, batch.labels, label_smoothing=smoothing)
    targets = mix_targets(batch.labels, batch.lam, logits.shape[1], smoothing)
    return -(targets * F.log_softmax(logits, dim=1)).sum(dim=1).mean()


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    """Return a context of autocast to bfloat16 if `precision` is bf16, else an empty one."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()


def count_batches(
    forward: Callable[[Tensor], Tensor],
    batches: Iterable[Batch],
    *,
    device: torch.device,
    precision: str,
    outputs: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Evaluate batches without gradients; yield each batch's labels (int64 [B]) and the result of `count_correct`.

    Args:
        forward: images [B, 3, H, W] -> logits [B, N].
        precision: bf16 or fp32.
        outputs: int64 [classes], the model output of each class; None: output i is class i.
    """
    for batch in batches:
        with torch.no_grad(), autocast(device, precision):
            logits = forward(batch.images)
        if outputs is not None:
            logits = logits.index_select(1, outputs)
        yield batch.labels, count_correct(logits, batch)


def count_correct(logits: Tensor, batch: Batch) -> Tensor:
    """Return 1, top-1 hit, top-5 hit and cross-entropy of each row (zeros if its mask is False), as float64 [B, 4]."""
    logits = logits.float()
    hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == batch.labels[:, None]
    losses = F.cross_entropy(logits, batch.labels, reduction="none")
    rows = torch.stack([torch.ones_like(losses), hits[:, 0].float(), hits.any(dim=1).float(), losses], dim=1)
    return torch.where(batch.mask[:, None], rows, 0.0).double()

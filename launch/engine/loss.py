"""The training loss of a micro-batch, and the accuracy and predictions of evaluation batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from launch.config.optim import OptimConfig
from launch.machine.world import World
from pipeline.augment.pixels import mix_targets
from pipeline.loader import Batch
from pipeline.plan import NO_SAMPLE

MAX_TOP5 = 5
"""Number of classes up to which top-5 accuracy is always 100 %."""


def training_loss(logits: Tensor, batch: Batch, optim: OptimConfig) -> Tensor:
    """Return the loss of the recipe (`OptimConfig.loss`) as a float32 scalar.

    Args:
        logits: [B, classes], any float dtype.
    """
    if optim.loss == "bce":
        return soft_binary_cross_entropy(logits, batch, optim.label_smoothing, optim.bce_target_threshold)
    return soft_cross_entropy(logits, batch, optim.label_smoothing)


def soft_binary_cross_entropy(logits: Tensor, batch: Batch, smoothing: float, threshold: float | None) -> Tensor:
    """Return the binary cross-entropy, averaged over rows and classes, as a float32 scalar.

    Equals timm's `BinaryCrossEntropy` (ResNet strikes back, arXiv 2110.00476).

    Args:
        logits: [B, classes], any float dtype.
        threshold: targets above it become 1, others 0. None: targets are not rounded.
    """
    classes = logits.shape[1]
    if batch.lam is None:
        targets = torch.full(logits.shape, smoothing / classes, device=logits.device)
        targets.scatter_(1, batch.labels[:, None], 1 - smoothing + smoothing / classes)
    else:
        targets = mix_targets(batch.labels, batch.lam, classes, smoothing)
    if threshold is not None:
        targets = targets.gt(threshold).to(targets.dtype)
    return F.binary_cross_entropy_with_logits(logits.float(), targets)


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


class BatchResult(NamedTuple):
    """Results of an evaluation batch, on the device. Nothing waits for them."""

    labels: Tensor
    """int64 [B]."""
    counts: Tensor
    """float64 [B, 4]: 1, top-1 hit, top-5 hit and cross-entropy of each row; zeros if its mask is False."""
    predictions: Tensor
    """float64 [B, 4]: class with the highest probability, cross-entropy, probability of the label and of that class."""
    outputs: int
    """Number of classes that were compared."""


def evaluate_batches(
    forward: Callable[[Tensor], Tensor],
    batches: Iterable[Batch],
    *,
    device: torch.device,
    precision: str,
    outputs: Tensor | None = None,
    samples: SampleResults | None = None,
) -> Iterator[BatchResult]:
    """Evaluate batches without gradients; yield the result of each batch.

    Args:
        forward: images [B, 3, H, W] -> logits [B, N].
        precision: bf16 or fp32.
        outputs: int64 [classes], the model output of each class; None: output i is class i.
        samples: collects the predictions of all batches.
    """
    for batch in batches:
        with torch.no_grad(), autocast(device, precision):
            logits = forward(batch.images)
        if outputs is not None:
            logits = logits.index_select(1, outputs)
        result = evaluate_logits(logits, batch)
        if samples is not None:
            samples.add(batch, result)
        yield result


def evaluate_logits(logits: Tensor, batch: Batch) -> BatchResult:
    """Compare the logits [B, N] of a batch with its labels, in float32."""
    logits = logits.float()
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = best == batch.labels[:, None]
    logarithms = F.log_softmax(logits, dim=1)
    losses = F.nll_loss(logarithms, batch.labels, reduction="none")
    rows = torch.stack([torch.ones_like(losses), hits[:, 0].float(), hits.any(dim=1).float(), losses], dim=1)
    confidences = logarithms.gather(1, best[:, :1])[:, 0].exp()
    predictions = torch.stack([best[:, 0].double(), losses, losses.neg().exp(), confidences], dim=1)
    counts = torch.where(batch.mask[:, None], rows, 0.0).double()
    return BatchResult(batch.labels, counts, predictions, logits.shape[1])


class SampleResults:
    """Collects the predictions of an evaluation on the device, to copy all of them to the host at its end."""

    def __init__(self) -> None:
        self.outputs = 1
        """Number of classes that were compared."""
        self._ids: list[NDArray[np.int64]] = []
        self._rows: list[Tensor] = []

    def add(self, batch: Batch, result: BatchResult) -> None:
        self.outputs = result.outputs
        self._ids.append(batch.ids)
        self._rows.append(torch.cat([result.labels[:, None], result.predictions], dim=1))

    def gather(self, world: World) -> NDArray[np.float64] | None:
        """Return the rows of all ranks on rank 0 (None elsewhere), without padding and bad samples. Collective.

        Returns:
            float64 [samples, 6]: id, label, prediction, loss, probability of the label and of the prediction.
        """
        ids = np.concatenate(self._ids)
        rows = np.column_stack([ids, torch.cat(self._rows).cpu().numpy()])[ids != NO_SAMPLE]
        if world.size == 1:
            return rows
        parts: list[Any] | None = [None] * world.size if world.is_main else None
        dist.gather_object(rows, parts)  # ranks may have different numbers of rows, because some are omitted
        return None if parts is None else np.concatenate(parts)

"""The batch that loaders deliver."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from pipeline.augment.torch_impl.mix import mix_targets
from pipeline.plan import Ids, Position

IGNORED_LABEL = -100
"""Target of rows that do not count: the default `ignore_index` of `torch.nn.functional.cross_entropy`."""


@dataclass(frozen=True, kw_only=True)
class TargetOptions:
    """Options of the targets of a training."""

    num_classes: int
    """Number of classes of mixed or smoothed targets."""
    label_smoothing: float = 0.0
    """Fraction of each target, 0 to 1, that is distributed evenly over all classes."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch of one rank. Tensors are on the loader's device, NumPy arrays on the host."""

    images: torch.Tensor
    """float [B, 3, size, size] in the loader's dtype, RGB, channels-last, normalized; in training also augmented and
    mixed."""
    labels: torch.Tensor
    """int64 [B]: class numbers. For mixed rows, the label before mixing."""
    ids: Ids
    """int64 [B], NumPy: id of the sample in each row of `images`; `NO_SAMPLE` where `mask` is False."""
    planned: Ids
    """int64 [B], NumPy: sample ids of the plan. They differ from `ids` in rows whose sample is bad: in training the row
    contains a replacement sample, in evaluation it is masked out."""
    mask: torch.Tensor
    """bool [B]: True for rows with a valid sample. In evaluation, False for padding rows and rows of bad samples; in
    training, always True."""
    lam: torch.Tensor | None = None
    """float32 [B], 0 to 1: weight of a row's own label; the label of its partner (row i ^ 1) has weight 1 - lam. None:
    no row is mixed."""
    position: Position
    """In training, the global batch that this micro-batch belongs to; in evaluation, (0, step)."""
    micro: int = 0
    """Number of this micro-batch within the rank's step, from 0."""
    target_options: TargetOptions | None = None
    """Options of `targets`. None in evaluation: no row is mixed, and labels are not smoothed."""
    ready: torch.cuda.Event | None = field(default=None, compare=False)
    """CUDA event with timing, recorded when the batch is complete on the device; None on a CPU. The loader has already
    made the consumer's current stream wait for it."""

    @cached_property
    def targets(self) -> Tensor:
        """Targets for which `F.cross_entropy(model(batch.images), batch.targets)` is the loss of the batch.

        With mixup, CutMix or label smoothing: float32 [B, classes], probabilities. Otherwise int64 [B], class numbers,
        and `IGNORED_LABEL`, which `F.cross_entropy` ignores, in rows whose mask is False. Computed at the first access,
        on the current stream, without waiting for the device.
        """
        options = self.target_options
        if self.lam is None and (options is None or not options.label_smoothing):
            return torch.where(self.mask, self.labels, IGNORED_LABEL)
        if options is None:
            raise ValueError("the targets of mixed rows need target_options, for the number of classes")
        return mix_targets(self.labels, self.lam, options.num_classes, options.label_smoothing)


def timed_event(device: torch.device) -> torch.cuda.Event | None:
    """Record an event with timing in the current stream of the device; return None on a CPU."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event

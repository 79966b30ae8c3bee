"""The batch that loaders deliver."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from pipeline.plan import Ids, Position


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch of one rank. Tensors are on the loader's device, NumPy arrays on the host."""

    images: torch.Tensor
    """float [B, 3, size, size] in the loader's dtype, RGB, channels-last, normalised; in training also augmented and
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
    ready: torch.cuda.Event | None = field(default=None, compare=False)
    """CUDA event with timing, recorded when the batch is complete on the device; None on a CPU. The loader has already
    made the consumer's current stream wait for it."""


def timed_event(device: torch.device) -> torch.cuda.Event | None:
    """Record an event with timing in the current stream of the device; return None on a CPU."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event

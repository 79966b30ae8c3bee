"""What loaders deliver."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from pipeline.plan import Ids, Position


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch on the device."""

    images: torch.Tensor
    """float [B, 3, size, size], channels-last, normalised (and mixed, in training)."""
    labels: torch.Tensor
    """int64 [B]."""
    ids: Ids
    """int64 [B] on the host: the samples that `images` holds; `NO_SAMPLE` where `mask` is False."""
    planned: Ids
    """int64 [B] on the host: the samples that the plan asked for; others than `ids` where bad ones were replaced."""
    mask: torch.Tensor
    """bool [B]: False for rows that only fill up the last batches of an evaluation, or whose sample is bad."""
    lam: torch.Tensor | None = None
    """float32 [B]: weight of a row's own label, the rest is its partner's (row i ^ 1); None = nothing was mixed."""
    position: Position
    """In training, the global batch that this micro-batch belongs to; in evaluation, (0, step)."""
    micro: int = 0
    """Number of this micro-batch within its rank's step."""
    ready: torch.cuda.Event | None = field(default=None, compare=False)
    """Recorded, with its time, when the batch is whole; loaders make the consumer's stream wait for it."""


def timed_event(device: torch.device) -> torch.cuda.Event | None:
    """Record an event that keeps its time in the device's current stream; None on a CPU."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event

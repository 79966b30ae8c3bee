"""Batches without input: to see how fast a model is when it never waits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from pipeline.batch import Batch, timed_event
from pipeline.jobs import BatchRequest
from pipeline.plan import NO_SAMPLE


def synthetic_batches(
    work: Iterable[BatchRequest],
    *,
    size: int,
    classes: int,
    device: torch.device,
    dtype: torch.dtype,
    mixed: bool = False,
) -> Iterator[Batch]:
    """Batches with the plan's ids and positions, all of the same random images, which are on the device already.

    Args:
        size: side of the images in pixels.
        classes: labels are drawn from so many.
        mixed: say that rows are mixed half and half.
    """
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    generator = torch.Generator(device).manual_seed(0)
    for request in work:
        n = len(request.ids)
        if n not in made:
            images = torch.randn(n, 3, size, size, device=device, dtype=dtype, generator=generator)
            labels = torch.randint(classes, (n,), device=device, generator=generator)
            made[n] = images.contiguous(memory_format=torch.channels_last), labels
        images, labels = made[n]
        yield Batch(
            images=images,
            labels=labels,
            ids=request.ids,
            planned=request.ids,
            mask=torch.from_numpy(request.ids != NO_SAMPLE).to(device),
            lam=torch.full((n,), 0.5, device=device) if mixed else None,
            position=request.position,
            micro=request.micro,
            ready=timed_event(device),
        )

"""Synthetic batches, to measure the speed of a model that never waits for input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

from pipeline.batch import Batch, TargetOptions, timed_event
from pipeline.jobs import BatchRequest
from pipeline.plan import NO_SAMPLE


def synthetic_batches(
    requests: Iterable[BatchRequest],
    *,
    size: Callable[[BatchRequest], int],
    classes: int,
    device: torch.device,
    dtype: torch.dtype,
    mixed: bool = False,
    target_options: TargetOptions | None = None,
) -> Iterator[Batch]:
    """Yield batches with the ids and positions of the plan, but the same random images, which stay on the device.

    Args:
        requests: the batches of the plan.
        size: returns the side of a batch's images in pixels.
        classes: number of classes; labels are drawn from 0 to `classes` - 1.
        device: device of the tensors.
        dtype: floating-point dtype of the images.
        mixed: set `lam` to 0.5 in every row, as if each pair of rows was mixed.
        target_options: options of the batches' targets.
    """
    by_shape: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
    generator = torch.Generator(device).manual_seed(0)
    for request in requests:
        n, side = len(request.ids), size(request)
        if (n, side) not in by_shape:
            images = torch.randn(n, 3, side, side, device=device, dtype=dtype, generator=generator)
            labels = torch.randint(classes, (n,), device=device, generator=generator)
            by_shape[n, side] = images.contiguous(memory_format=torch.channels_last), labels
        images, labels = by_shape[n, side]
        yield Batch(
            images=images,
            labels=labels,
            ids=request.ids,
            planned=request.ids,
            mask=torch.from_numpy(request.ids != NO_SAMPLE).to(device),
            lam=torch.full((n,), 0.5, device=device) if mixed else None,
            position=request.position,
            micro=request.micro,
            target_options=target_options,
            ready=timed_event(device),
        )

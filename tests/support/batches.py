"""Fixed random batches for tests that train without data."""

from __future__ import annotations

import numpy as np
import torch

from pipeline.batch import Batch
from pipeline.plan import Position

CLASSES, SIZE = 10, 32


def random_batch(step: int, rows: range, *, device: str = "cpu", size: int = SIZE) -> Batch:
    """Return rows of the batch of a step: float32 images [len(rows), 3, size, size], channels-last."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(rows.stop, 3, size, size, generator=generator)[rows.start :]
    labels = torch.randint(0, CLASSES, (rows.stop,), generator=generator)[rows.start :]
    return Batch(
        images=images.to(device).contiguous(memory_format=torch.channels_last),
        labels=labels.to(device),
        ids=np.array(rows),
        planned=np.array(rows),
        mask=torch.ones(len(rows), dtype=torch.bool, device=device),
        position=Position(0, step),
    )

"""The learning-rate schedule: linear warm-up, then a cosine that spans the whole training from step 0.

The learning rate drops a little when warm-up ends, because the cosine has already begun. Steps 0 and 1 have the same
rate, because the released code sets the rate after each step, from the index of that step.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from launch.config.optim import OptimConfig


def learning_rate(
    step: int, *, steps_per_epoch: int, epochs: int, warmup_epochs: float, first: float, peak: float, last: float
) -> float:
    """Return the learning rate of optimizer step `step` (0-based).

    Args:
        steps_per_epoch, epochs: length of the whole training.
        warmup_epochs: length of the linear rise from `first` to `peak`.
        peak, last: first and last value of the cosine.
    """
    t = max(step - 1, 0)
    warmup = int(warmup_epochs * steps_per_epoch)
    if t < warmup:
        return first + t * (peak - first) / warmup
    return last + 0.5 * (peak - last) * (1 + math.cos(math.pi * t / (epochs * steps_per_epoch)))


def lr_schedule(optim: OptimConfig, *, global_batch: int, steps_per_epoch: int) -> Callable[[int], float]:
    """Return the learning rate as a function of the optimizer step (0-based)."""
    first, peak, last = optim.rates(global_batch)
    epochs, warmup = optim.epochs, optim.warmup
    return lambda step: learning_rate(
        step, steps_per_epoch=steps_per_epoch, epochs=epochs, warmup_epochs=warmup, first=first, peak=peak, last=last
    )

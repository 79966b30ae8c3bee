"""The learning rate of every step: linear warm-up, then a cosine that spans the whole training from step 0.

So the rate falls by a little when warm-up ends, and, since the released code sets the rate *after* each step with that
step's index, steps 0 and 1 share the first value (docs of the recipe: README, "The recipe").
"""

from __future__ import annotations

import math
from collections.abc import Callable

from launch.config.optim import OptimConfig


def learning_rate(
    step: int, *, steps_per_epoch: int, epochs: int, warmup_epochs: float, first: float, peak: float, last: float
) -> float:
    """Learning rate of optimiser step `step` (0-based).

    Args:
        steps_per_epoch, epochs: the length of the whole training.
        warmup_epochs: length of the linear rise from `first` to `peak`.
        peak, last: the cosine's ends.
    """
    t = max(step - 1, 0)
    warmup = int(warmup_epochs * steps_per_epoch)
    if t < warmup:
        return first + t * (peak - first) / warmup
    return last + 0.5 * (peak - last) * (1 + math.cos(math.pi * t / (epochs * steps_per_epoch)))


def rate_of(optim: OptimConfig, *, global_batch: int, steps_per_epoch: int) -> Callable[[int], float]:
    """The learning rate as a function of the optimizer step (0-based)."""
    first, peak, last = optim.rates(global_batch)
    epochs, warmup = optim.epochs, optim.warmup
    return lambda step: learning_rate(
        step, steps_per_epoch=steps_per_epoch, epochs=epochs, warmup_epochs=warmup, first=first, peak=peak, last=last
    )

"""Learning-rate schedules: linear warm-up, then a decay."""

from __future__ import annotations

import math
from collections.abc import Callable

from launch.config.optim import OptimConfig, Schedule

# Fraction of the way from the last to the peak learning rate, after a fraction p of the decay: 1 at p = 0.
_DECAYS: dict[Schedule, Callable[[float], float]] = {
    "cosine": lambda p: 0.5 * (1 + math.cos(math.pi * p)),
    "linear": lambda p: 1 - p,
    "wsd": lambda p: 1 - math.sqrt(p),
    "constant": lambda p: 1.0,
}


def lr_schedule(optim: OptimConfig, *, global_batch: int, steps_per_epoch: int) -> Callable[[int], float]:
    """Return the learning rate as a function of the optimizer step (0-based).

    Step 0 has the first rate of `OptimConfig.rates`, the first step after warm-up has the peak, and the last step has
    the last rate (with "constant": the peak). Only "cosine-from-start" differs (`_released_schedule`).

    Raises:
        RecipeError: see `OptimConfig.rates`.
    """
    first, peak, last = optim.rates(global_batch)
    steps, warmup = optim.epochs * steps_per_epoch, int(optim.warmup * steps_per_epoch)
    schedule = optim.resolved_schedule
    if schedule == "cosine-from-start":
        return lambda step: _released_schedule(step, steps=steps, warmup=warmup, first=first, peak=peak, last=last)
    decay, end = _DECAYS[schedule], steps - 1
    start = max(warmup, end - max(1, round(optim.decay_fraction * steps))) if schedule == "wsd" else warmup

    def rate(step: int) -> float:
        if step < warmup:
            return first + step * (peak - first) / warmup
        if step <= start:  # the peak exactly, without rounding
            return peak
        return last + (peak - last) * decay((step - start) / (end - start))

    return rate


def _released_schedule(step: int, *, steps: int, warmup: int, first: float, peak: float, last: float) -> float:
    """Return the learning rate of FAT's released code (timm's CosineLRScheduler) at a step.

    The cosine spans all `steps` from step 0, so the rate drops a little when warm-up ends. Steps 0 and 1 have the same
    rate, because the released code sets the rate after each step, from the index of that step.
    """
    t = max(step - 1, 0)
    if t < warmup:
        return first + t * (peak - first) / warmup
    return last + 0.5 * (peak - last) * (1 + math.cos(math.pi * t / steps))

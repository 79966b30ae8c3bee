"""The learning-rate schedule (launch/engine/schedule.py) equals timm's at every step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from launch.config.optim import OptimConfig
from launch.engine.schedule import lr_schedule

FIXTURE = Path(__file__).parents[1] / "fixtures" / "timm_recipe.npz"


def test_every_learning_rate_of_300_epochs_equals_timm() -> None:
    with np.load(FIXTURE) as fixture:
        expected = fixture["lr (300 epochs x 10 steps, batch 1024)"]
    rate = lr_schedule(OptimConfig(), global_batch=1024, steps_per_epoch=10)
    np.testing.assert_allclose([rate(step) for step in range(3000)], expected, rtol=1e-12)


@pytest.mark.parametrize(("global_batch", "scale"), [(1024, 2.0), (256, 0.5), (4096, 8.0)])
def test_rates_scale_with_the_global_batch(global_batch: int, scale: float) -> None:
    assert OptimConfig().rates(global_batch) == pytest.approx((5e-7 * scale, 5e-4 * scale, 5e-6 * scale))


def test_explicit_rates_do_not_scale() -> None:
    assert OptimConfig(warmup_lr=1.0, lr=3.0, min_lr=2.0).rates(4096) == (1.0, 3.0, 2.0)

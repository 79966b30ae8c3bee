"""Learning rates are the reference's, step by step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from launch.config.optim import OptimConfig
from launch.engine.schedule import rate_of

FIXTURE = Path(__file__).parents[1] / "fixtures" / "timm_recipe.npz"


def test_every_rate_of_300_epochs_is_timms() -> None:
    with np.load(FIXTURE) as fixture:
        expected = fixture["lr (300 epochs x 10 steps, batch 1024)"]
    rate = rate_of(OptimConfig(), global_batch=1024, steps_per_epoch=10)
    np.testing.assert_allclose([rate(step) for step in range(3000)], expected, rtol=1e-12)


def test_rates_scale_with_the_global_batch() -> None:
    assert OptimConfig().rates(512) == pytest.approx((5e-7, 5e-4, 5e-6))
    assert OptimConfig().rates(1024) == pytest.approx((1e-6, 1e-3, 1e-5))
    assert OptimConfig(lr=0.1, warmup_lr=0.2, min_lr=0.3).rates(1024) == (0.2, 0.1, 0.3)

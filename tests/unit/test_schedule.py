"""Learning-rate schedules (launch/optim/schedule.py): the released code's at 300 epochs, properties of the others."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.config.errors import RecipeError
from launch.config.optim import OptimConfig, Schedule
from launch.optim.schedule import lr_schedule

FIXTURE = Path(__file__).parents[1] / "fixtures" / "timm_recipe.npz"
CONTINUOUS: list[Schedule] = ["cosine", "linear", "wsd", "constant"]


def rates_of(optim: OptimConfig, steps_per_epoch: int, *, global_batch: int = 512) -> list[float]:
    rate = lr_schedule(optim, global_batch=global_batch, steps_per_epoch=steps_per_epoch)
    return [rate(step) for step in range(optim.epochs * steps_per_epoch)]


def test_every_learning_rate_of_300_epochs_equals_timm() -> None:
    with np.load(FIXTURE) as fixture:
        expected = fixture["lr (300 epochs x 10 steps, batch 1024)"]
    np.testing.assert_allclose(rates_of(OptimConfig(), 10, global_batch=1024), expected, rtol=1e-12)
    np.testing.assert_allclose(rates_of(OptimConfig(warmup_epochs=20), 10, global_batch=1024), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("optim", "schedule", "warmup"),
    [
        (OptimConfig(), "cosine-from-start", 20),
        (OptimConfig(warmup_epochs=40), "cosine", 40),
        (OptimConfig(schedule="cosine"), "cosine", 15),
        (OptimConfig(epochs=3), "cosine", 0.15),
        (OptimConfig(epochs=100), "cosine", 5),
        (OptimConfig(epochs=1000), "cosine", 20),
        (OptimConfig(epochs=30, schedule="cosine-from-start"), "cosine-from-start", 2),
    ],
)
def test_schedule_is_the_paper_s_only_for_its_length_or_on_request(
    optim: OptimConfig, schedule: str, warmup: float
) -> None:
    assert optim.resolved_schedule == schedule
    assert optim.warmup == pytest.approx(warmup)


@given(
    schedule=st.sampled_from(CONTINUOUS),
    epochs=st.integers(1, 40),
    steps_per_epoch=st.integers(1, 30),
    warmup=st.none() | st.floats(0, 0.9),
    fraction=st.floats(0.01, 0.1),
    peak=st.floats(1e-6, 10),
)
def test_laws_of_the_schedules(
    *, schedule: Schedule, epochs: int, steps_per_epoch: int, warmup: float | None, fraction: float, peak: float
) -> None:
    """--lr is the highest rate, warm-up rises to it without a jump, and the last rate is --min-lr."""
    optim = OptimConfig(
        schedule=schedule,
        epochs=epochs,
        warmup_epochs=None if warmup is None else warmup * epochs,
        lr=peak,
        decay_fraction=fraction,
    )
    rates = rates_of(optim, steps_per_epoch)
    first, _, last = optim.rates(512)
    reached = rates.index(peak)
    assert max(rates) == peak
    assert rates[0] == (first if reached else peak)
    for before, after in pairwise(rates[: reached + 1]):  # equal steps up to the peak itself
        assert after - before == pytest.approx((peak - first) / reached, rel=1e-6)
    assert all(after <= before for before, after in pairwise(rates[reached:]))
    if schedule != "constant" and reached + 1 < len(rates):
        assert rates[-1] == last


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # 1 epoch of 2 of warm-up, then 9 steps: step 1 is at the peak, and step 9 is the last one.
        ("cosine", [1, *(0.01 + 0.99 * (1 + np.cos(np.pi * i / 8)) / 2 for i in range(1, 9))]),
        ("linear", [1, *(0.01 + 0.99 * (1 - i / 8) for i in range(1, 9))]),
        ("constant", [1] * 9),
        # 40 % of 10 steps: step 5 is the last one at the peak; then 1 - sqrt (arXiv 2405.18392).
        ("wsd", [1, 1, 1, 1, 1, *(0.01 + 0.99 * (1 - np.sqrt(i / 4)) for i in range(1, 5))]),
    ],
)
def test_shapes_after_warmup(schedule: Schedule, expected: list[float]) -> None:
    optim = OptimConfig(schedule=schedule, lr=1.0, epochs=10, warmup_epochs=1, decay_fraction=0.4)
    assert rates_of(optim, 1) == pytest.approx([0.001, *expected])


@pytest.mark.parametrize(("global_batch", "scale"), [(1024, 2.0), (256, 0.5), (4096, 8.0)])
def test_rates_scale_with_the_global_batch(global_batch: int, scale: float) -> None:
    assert OptimConfig().rates(global_batch) == pytest.approx((5e-7 * scale, 5e-4 * scale, 5e-6 * scale))


def test_explicit_rates_do_not_scale() -> None:
    assert OptimConfig(warmup_lr=1.0, lr=3.0, min_lr=2.0).rates(4096) == (1.0, 3.0, 2.0)
    assert OptimConfig(lr=3.0).rates(4096) == pytest.approx((0.003, 3.0, 0.03))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_lr": 1e-3}, "--min-lr 0.001: larger than the peak learning rate (--lr), which is 0.0005"),
        ({"warmup_lr": 1.0, "lr": 0.5}, "--warmup-lr 1: larger than the peak learning rate (--lr), which is 0.5"),
    ],
)
def test_rates_above_the_peak_are_rejected(options: dict[str, float], message: str) -> None:
    with pytest.raises(RecipeError) as refused:
        OptimConfig(**options).rates(512)
    assert str(refused.value) == message

"""Training losses (launch/engine/loss.py), compared with timm's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from launch.config.command_line import parse
from launch.config.errors import RecipeError
from launch.config.optim import OptimConfig
from launch.engine.loss import training_loss
from pipeline.augment.pixels import mix_targets
from pipeline.batch import Batch
from tests.support.batches import CLASSES, random_batch
from tests.support.vision_libraries import vision_libraries  # noqa: F401 - a fixture


def batch_of(mixed: bool, rows: int = 6) -> tuple[Batch, torch.Tensor]:
    """Return a batch, with mixed pairs of rows or without, and logits for it."""
    batch = random_batch(0, range(rows))
    generator = torch.Generator().manual_seed(1)
    lam = torch.rand(rows, generator=generator)
    return replace(batch, lam=lam if mixed else None), torch.randn(rows, CLASSES, generator=generator)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("threshold", [None, 0.2])
@pytest.mark.usefixtures("vision_libraries")
def test_binary_cross_entropy_equals_timm_s(mixed: bool, smoothing: float, threshold: float | None) -> None:
    from timm.loss import BinaryCrossEntropy

    batch, logits = batch_of(mixed)
    targets = mix_targets(batch.labels, batch.lam, CLASSES, smoothing) if mixed else batch.labels
    expected = BinaryCrossEntropy(smoothing=smoothing, target_threshold=threshold)(logits, targets)
    optim = OptimConfig(loss="bce", label_smoothing=smoothing, bce_target_threshold=threshold)
    torch.testing.assert_close(training_loss(logits, batch, optim), expected)


@pytest.mark.parametrize("mixed", [False, True])
def test_cross_entropy_is_that_of_soft_targets(mixed: bool) -> None:
    batch, logits = batch_of(mixed)
    lam = batch.lam if mixed else torch.ones(len(logits))
    targets = mix_targets(batch.labels, lam, CLASSES, 0.1)
    expected = torch.nn.functional.cross_entropy(logits, targets)
    torch.testing.assert_close(training_loss(logits, batch, OptimConfig()), expected)


def test_binary_cross_entropy_supports_odd_batches_and_half_precision() -> None:
    batch, logits = batch_of(mixed=False, rows=5)
    optim = OptimConfig(loss="bce")
    found = training_loss(logits.bfloat16(), batch, optim)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(training_loss(logits, batch, optim).item(), rel=1e-2)


def test_threshold_without_binary_cross_entropy_is_rejected() -> None:
    with pytest.raises(RecipeError, match="--bce-target-threshold: --loss is cross-entropy; add --loss bce"):
        parse(["--bce-target-threshold", "0.2"])

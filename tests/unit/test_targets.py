"""`F.cross_entropy(model(batch.images), batch.targets)` is the loss of a batch, in training and in evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from launch.engine.loss import soft_cross_entropy
from pipeline import AugmentRecipe, Batch, UserError, eval_loader, train_loader

MIXED = AugmentRecipe(size=32, mixup=0.8, cutmix=1.0)
PLAIN = AugmentRecipe(size=32)


def batch_of(digits: Path, recipe: AugmentRecipe, smoothing: float, classes: int | None = None) -> Batch:
    with train_loader(
        digits, batch_size=16, augment=recipe, label_smoothing=smoothing, num_classes=classes, rank=0, world=1
    ) as loader:
        assert loader.num_classes == (classes or 10)
        return next(iter(loader))


def expected_targets(batch: Batch, smoothing: float, classes: int) -> Tensor:
    """Compute soft targets one row at a time."""
    targets = torch.full((len(batch.labels), classes), smoothing / classes)
    for row, label in enumerate(batch.labels.tolist()):
        own = 1.0 if batch.lam is None else batch.lam[row].item()
        targets[row, label] += own * (1 - smoothing)
        targets[row, int(batch.labels[row ^ 1])] += (1 - own) * (1 - smoothing)
    return targets


@pytest.mark.parametrize("classes", [10, 13])
@pytest.mark.parametrize(("recipe", "smoothing"), [(MIXED, 0.0), (MIXED, 0.1), (PLAIN, 0.1)])
def test_mixed_or_smoothed_targets_are_probabilities(
    digits: Path, recipe: AugmentRecipe, smoothing: float, classes: int
) -> None:
    batch = batch_of(digits, recipe, smoothing, None if classes == 10 else classes)
    assert batch.targets.dtype == torch.float32
    torch.testing.assert_close(batch.targets, expected_targets(batch, smoothing, classes))
    torch.testing.assert_close(batch.targets.sum(dim=1), torch.ones(16))
    assert batch.targets is batch.targets, "computed once"


def test_targets_without_mixing_and_smoothing_are_class_numbers(digits: Path) -> None:
    batch = batch_of(digits, PLAIN, 0.0)
    assert batch.targets.dtype == torch.int64
    assert torch.equal(batch.targets, batch.labels)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("recipe", [MIXED, PLAIN])
def test_the_loss_is_that_of_the_training(digits: Path, recipe: AugmentRecipe, smoothing: float) -> None:
    batch = batch_of(digits, recipe, smoothing)
    logits = torch.randn(16, 10, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(F.cross_entropy(logits, batch.targets), soft_cross_entropy(logits, batch, smoothing))


def test_the_loss_of_an_evaluation_omits_rows_without_an_image(digits: Path) -> None:
    table = torch.randn(360, 10, generator=torch.Generator().manual_seed(0))
    losses, hits, rows = 0.0, 0, 0
    for rank in range(2):
        with eval_loader(digits, batch_size=100, size=32, rank=rank, world=2) as loader:
            for batch in loader:
                logits = table[torch.from_numpy(batch.ids)]  # the last row for NO_SAMPLE, -1
                losses += F.cross_entropy(logits, batch.targets, reduction="sum").item()
                hits += int((logits.argmax(dim=1) == batch.targets).sum())
                rows += int(batch.mask.sum())
    with eval_loader(digits, batch_size=360, size=32, rank=0, world=1) as loader:
        (batch,) = loader
    assert rows == 360
    assert hits == int((table.argmax(dim=1) == batch.labels).sum())
    assert losses / rows == pytest.approx(F.cross_entropy(table, batch.targets).item(), rel=1e-5)


@pytest.mark.parametrize(
    ("smoothing", "classes", "message"),
    [
        (1.5, None, "label_smoothing 1.5: expected a number from 0 to 1"),
        (0.0, 9, "num_classes 9: the data set has 10 classes"),
    ],
)
def test_invalid_targets_are_refused(digits: Path, smoothing: float, classes: int | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        batch_of(digits, PLAIN, smoothing, classes)

"""Random erasing and its noise (pipeline/augment/torch_impl/erase.py)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline import rng
from pipeline.augment.params import SampleParams, draw
from pipeline.augment.pixels import BatchAugment, normalize
from pipeline.augment.recipe import augment_recipe
from pipeline.augment.torch_impl.erase import hash_pixel, quantiles
from pipeline.rng import Stream

CPU = torch.device("cpu")


def erased(**changes: int) -> tuple[torch.Tensor, torch.Tensor, SampleParams]:
    """Return the values after and before erasing, and the parameters. Nearly every sample has a box."""
    recipe = augment_recipe("light", size=64, erase=1.0)
    ids = np.arange(100)
    sides = np.full(100, 64)
    params = draw(recipe, **({"seed": 0, "epoch": 0} | changes), ids=ids, heights=sides, widths=sides)
    images = torch.full((100, 64, 64, 3), 128, dtype=torch.uint8)
    plain = normalize(images, recipe.mean, recipe.std, torch.float32)
    return BatchAugment(recipe, CPU)(images, params), plain, params


def test_erasing_fills_its_box_and_nothing_else() -> None:
    after, before, params = erased()
    assert (params.erase_boxes[:, 2] > 0).mean() > 0.95
    for i, (y, x, h, w) in enumerate(params.erase_boxes):
        touched = (after[i] != before[i]).numpy()
        inside = np.zeros((3, 64, 64), dtype=bool)
        inside[:, y : y + h, x : x + w] = True
        assert not (touched & ~inside).any()
        assert touched[inside].mean() > 0.99 or not h


def test_the_noise_is_standard_normal_and_independent_between_channels_and_pixels() -> None:
    after, before, _ = erased()
    values = after.permute(0, 2, 3, 1)[(after != before).all(dim=1)].double().numpy()
    assert len(values) > 50_000
    np.testing.assert_allclose(values.mean(axis=0), 0, atol=0.02)
    np.testing.assert_allclose(np.cov(values.T), np.eye(3), atol=0.03)
    assert np.abs((values[1:] * values[:-1]).mean(axis=0)).max() < 0.02
    np.testing.assert_allclose((values**4).mean(), 3, atol=0.1)


@pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 1}])
def test_the_noise_differs_between_epochs_and_seeds(change: dict[str, int]) -> None:
    recipe = augment_recipe("light", size=64, erase=1.0)
    _, _, params = erased()
    _, _, others = erased(**change)
    images = torch.full((100, 64, 64, 3), 128, dtype=torch.uint8)
    one = BatchAugment(recipe, CPU)(images, params)
    other = BatchAugment(recipe, CPU)(images, replace(params, erase_keys=others.erase_keys))
    touched = params.erase_boxes[:, 2] > 0
    assert (one != other).flatten(1).any(dim=1).numpy()[touched].all()


def test_the_hash_on_the_device_equals_the_hash_on_the_host() -> None:
    keys = rng.bits(Stream.ERASE_NOISE, 5, np.arange(1000))
    place = np.arange(1000) * 37
    there = hash_pixel(torch.from_numpy(keys.view(np.int64)), torch.from_numpy(place))
    assert np.array_equal(there.numpy().view(np.uint64), rng.extend(keys, place))


def test_the_noise_table_holds_the_quantiles_of_the_standard_normal() -> None:
    table = quantiles().astype(float)
    assert (np.diff(table) > 0).all()
    np.testing.assert_allclose(table, -table[::-1], rtol=1e-6)
    assert table.var() == pytest.approx(1, abs=1e-4)

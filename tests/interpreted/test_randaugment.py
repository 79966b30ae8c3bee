"""RandAugment's kernels return the same bytes as PyTorch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.augment.ops import Op
from pipeline.augment.params import draw
from pipeline.augment.pixels import BatchAugment
from pipeline.augment.recipe import augment_recipe
from pipeline.augment.triton_impl import randaugment
from tests.support.randaugment_checks import FILL, assert_equals_torch, noisy_images, parameters

MAGNITUDES = np.array([0.0, 3.3, 9.0, 10.0])
each_op = pytest.mark.parametrize("op", Op, ids=lambda op: op.title)


@each_op
def test_every_magnitude_and_sign(op: Op) -> None:
    magnitudes, signs = np.repeat(MAGNITUDES, 2)[:, None], np.tile([-1.0, 1.0], 4)[:, None]
    assert_equals_torch(
        noisy_images(np.random.default_rng(0), 8, 9, 13), parameters(np.full((8, 1), op), magnitudes, signs)
    )


@pytest.mark.parametrize("op", [Op.TRANSLATE_X, Op.TRANSLATE_Y], ids=lambda op: op.title)
def test_translations_at_which_rounding_decides(op: Op) -> None:
    """With translations by fifths of a pixel, every 125th sum should be an integer, and rounding decides on which side
    of it the sum is. With halves, the first or the last pixels are exactly at the edge."""
    shifts, size = np.array([-0.5, 0.5, 3.6, 0.8]), 48
    params = parameters(np.full((4, 1), op), np.zeros((4, 1)), np.ones((4, 1)))
    params = replace(params, arguments=shifts[:, None] / size)
    assert_equals_torch(np.random.default_rng(0).integers(256, size=(4, size, size, 3), dtype=np.uint8), params)


DEGENERATE = {
    "flat": np.full((4, 4, 3), 77),
    "two values": np.tile([[[3], [250]], [[250], [250]]], (2, 2, 3)),
    "one pixel": np.array([[[9, 200, 31]]]),
    "no inner pixel": np.arange(12).reshape(2, 2, 3) * 20,
    "one inner pixel": np.arange(27).reshape(3, 3, 3) * 9,
}


@each_op
@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_images(op: Op, name: str) -> None:
    once = parameters(np.full((1, 1), op), np.array([9.0]), np.array([-1.0]))
    assert_equals_torch(DEGENERATE[name][None].astype(np.uint8), once)


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("flip", [False, True])
def test_samples_with_zero_to_three_operations_and_flips(batch: int, flip: bool) -> None:
    recipe = augment_recipe("fat", size=24, rand_augment="rand-m9-mstd2-inc1-p0.6-n3")
    sides = np.full(batch, 64)
    params = draw(recipe, seed=batch, epoch=0, ids=np.arange(batch), heights=sides, widths=sides)
    assert params.applied.any()
    assert_equals_torch(noisy_images(np.random.default_rng(0), batch, 24, 24), params, flip=flip)


KINDS = (Op.EQUALIZE, Op.AUTO_CONTRAST, Op.CONTRAST, Op.POSTERIZE, Op.COLOR, Op.SHARPNESS, Op.SHEAR_Y, Op.ROTATE)


@pytest.mark.parametrize("first", KINDS, ids=lambda op: op.title)
def test_every_pair_of_kinds_of_operation(first: Op) -> None:
    ops = np.array([(first, second) for second in KINDS])
    signs = np.where(np.arange(len(ops)) % 3, 1.0, -1.0)[:, None]
    assert_equals_torch(noisy_images(np.random.default_rng(0), len(ops), 7, 5), parameters(ops, np.array([8.7]), signs))


@pytest.mark.parametrize(
    "op",
    [Op.EQUALIZE, Op.CONTRAST, Op.INVERT, Op.COLOR, Op.SHARPNESS, Op.SHEAR_X, Op.TRANSLATE_Y, Op.ROTATE],
    ids=lambda op: op.title,
)
def test_samples_of_several_tiles(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both for the kernel that changes pixels and the one that counts them; the last tiles are not full."""
    monkeypatch.setattr(randaugment, "TILE", 256)
    monkeypatch.setattr(randaugment, "BLOCK", 512)
    ops = np.full((1, 1), op)
    assert_equals_torch(
        noisy_images(np.random.default_rng(0), 1, 37, 31), parameters(ops, np.array([8.0]), np.array([1.0]))
    )


def test_batch_augment_uses_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, batch, cpu = augment_recipe("fat", size=13), 8, torch.device("cpu")
    sides = np.full(batch, 64)
    params = draw(recipe, seed=3, epoch=0, ids=np.arange(batch), heights=sides, widths=sides)
    images = torch.from_numpy(noisy_images(np.random.default_rng(0), batch, 13, 13))
    calls, apply_ops = [], randaugment.apply_ops

    def counted(images: Tensor, *args: object, **options: object) -> Tensor:
        calls.append(len(images))
        return apply_ops(images, *args, **options)

    monkeypatch.setattr(randaugment, "apply_ops", counted)
    found = BatchAugment(recipe, cpu, flip=True)(images, params)
    assert calls == [batch]
    exact = BatchAugment(recipe, cpu, flip=True, kernels=False)(images, params)
    assert calls == [batch]
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)


def test_without_operations_the_images_are_returned_unchanged() -> None:
    recipe, sides = augment_recipe("light", size=8), np.full(2, 64)
    params = draw(recipe, seed=3, epoch=0, ids=np.arange(2), heights=sides, widths=sides)
    images = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
    assert randaugment.apply_ops(images, params, FILL, flip=False) is images

"""RandAugment's kernels against the torch families, sample by sample: the same bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.augment import geometry, randaugment
from pipeline.augment.ops import Op, arguments
from pipeline.augment.params import SampleParams, draw
from pipeline.augment.pixels import FAMILIES, BatchAugment
from pipeline.augment.recipe import augment_recipe

FILL = (124, 116, 104)
PHOTO = np.load(Path(__file__).parents[1] / "fixtures" / "timm_recipe.npz")["photo0"]
MAGNITUDES = (0.0, 3.3, 9.0, 10.0)
GEOMETRIC = (Op.ROTATE, Op.SHEAR_X, Op.SHEAR_Y, Op.TRANSLATE_X, Op.TRANSLATE_Y)


def pictures(count: int, height: int, width: int) -> NDArray[np.uint8]:
    """Parts of a photo, noise, and noise of few levels by turns; uint8 [count, height, width, 3]."""
    rng = np.random.default_rng(count * height * width)
    noise = rng.integers(256, size=(count, height, width, 3))
    low = rng.integers(200, size=(count, 1, 1, 3))
    tops, lefts = rng.integers(PHOTO.shape[0] - height, size=count), rng.integers(PHOTO.shape[1] - width, size=count)
    photos = [PHOTO[y : y + height, x : x + width] for y, x in zip(tops, lefts, strict=True)]
    kinds = np.stack([np.stack(photos), noise, low + noise % 40])
    return kinds[np.arange(count) % 3, np.arange(count)].astype(np.uint8)


def parameters(
    ops: NDArray[np.int64], argument: NDArray[np.float64], applied: NDArray[np.bool_], flips: NDArray[np.bool_]
) -> SampleParams:
    """Of [n, L] operations; what is not used here is 0."""
    boxes, keys = np.zeros((len(ops), 4), np.int32), np.arange(len(ops))
    return SampleParams(
        ids=keys,
        windows=boxes,
        flips=flips,
        ops=ops,
        applied=applied,
        magnitudes=np.zeros(ops.shape),
        arguments=argument,
        erase_boxes=boxes,
        erase_keys=keys.astype(np.uint64),
    )


def everywhere(op: Op, magnitudes: NDArray[np.float64], signs: NDArray[np.float64]) -> SampleParams:
    """One operation on every sample."""
    ops = np.full((len(signs), 1), op, np.int64)
    argument = arguments(ops, magnitudes[:, None], signs[:, None], increasing=True)
    return parameters(ops, argument, np.ones(ops.shape, np.bool_), np.zeros(len(signs), np.bool_))


def by_torch(image: NDArray[np.uint8], params: SampleParams, i: int, *, flip: bool) -> NDArray[np.uint8]:
    """Sample i, uint8 [H, W, 3], one operation after another."""
    if flip and params.flips[i]:
        image = image[:, ::-1]
    for op, argument, applied in zip(params.ops[i], params.arguments[i], params.applied[i], strict=True):
        if applied:
            family = next(family for family in FAMILIES if op in family.ops)
            ops, values = np.array([op]), np.array([argument])
            arrays = [geometry.matrices(ops, values, *image.shape[:2])]
            if op not in GEOMETRIC:
                arrays = family.prepare(ops, values, 0)
            batch = torch.from_numpy(image[None].copy())
            image = family.run(batch, [torch.from_numpy(array) for array in arrays], FILL)[0].numpy()
    return image


def expect_torchs_bytes(images: NDArray[np.uint8], params: SampleParams, *, flip: bool = False) -> None:
    before = torch.from_numpy(images.copy())
    given = before.clone()
    found = randaugment.operate(given, params, FILL, flip=flip)
    assert found.is_contiguous()
    assert torch.equal(given, before)
    for i, image in enumerate(images):
        difference = found[i].numpy().astype(int) - by_torch(image, params, i, flip=flip)
        what = f"sample {i}: {[Op(op).title for op in params.ops[i][params.applied[i]]]} {params.arguments[i]}"
        assert not difference.any(), f"{what}: {np.count_nonzero(difference)} bytes of {difference.size} differ"


@pytest.mark.parametrize("op", Op, ids=lambda op: op.title)
def test_every_operation_at_every_magnitude_and_sign(op: Op) -> None:
    magnitudes, signs = (side.ravel() for side in np.meshgrid(MAGNITUDES, (-1.0, 1.0)))
    expect_torchs_bytes(pictures(len(signs), 9, 13), everywhere(op, magnitudes, signs))


FLAT = np.full((4, 4, 3), 77)
TWO_VALUES = np.tile([[[3], [250]], [[250], [250]]], (2, 2, 3))
ONE_PIXEL = np.array([[[9, 200, 31]]])
NO_INNER_PIXEL = np.arange(12).reshape(2, 2, 3) * 20
ONE_INNER_PIXEL = np.arange(27).reshape(3, 3, 3) * 9


@pytest.mark.parametrize("op", Op, ids=lambda op: op.title)
def test_degenerate_images(op: Op) -> None:
    for image in (FLAT, TWO_VALUES, ONE_PIXEL, NO_INNER_PIXEL, ONE_INNER_PIXEL):
        expect_torchs_bytes(image[None].astype(np.uint8), everywhere(op, np.array([9.0]), np.array([-1.0])))


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("flip", [False, True])
def test_layers_flips_and_untouched_samples(batch: int, flip: bool) -> None:
    """One to three operations of a sample, or none."""
    recipe = augment_recipe("fat", size=24, rand_augment="rand-m9-mstd2-inc1-p0.6-n3")
    params = draw(recipe, seed=batch, epoch=0, ids=np.arange(batch), heights=[64] * batch, widths=[64] * batch)
    assert params.applied.any()
    expect_torchs_bytes(pictures(batch, 24, 24), params, flip=flip)


def test_every_pair_of_kinds_of_operation() -> None:
    kinds = (Op.EQUALIZE, Op.AUTO_CONTRAST, Op.CONTRAST, Op.POSTERIZE, Op.COLOR, Op.SHARPNESS, Op.SHEAR_Y, Op.ROTATE)
    ops = np.array([(first, second) for first in kinds for second in kinds], np.int64)
    argument = arguments(
        ops, np.full(ops.shape, 8.7), np.where(np.arange(len(ops)) % 3, 1.0, -1.0)[:, None], increasing=True
    )
    params = parameters(ops, argument, np.ones(ops.shape, np.bool_), np.zeros(len(ops), np.bool_))
    expect_torchs_bytes(pictures(len(ops), 7, 5), params)


@pytest.mark.parametrize(
    "op", [Op.EQUALIZE, Op.CONTRAST, Op.INVERT, Op.SHARPNESS, Op.SHEAR_X, Op.ROTATE], ids=lambda op: op.title
)
def test_samples_of_several_tiles(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of pixels that are applied, and of those that are measured; the last ones not full."""
    monkeypatch.setattr(randaugment, "TILE", 256)
    monkeypatch.setattr(randaugment, "BLOCK", 512)
    expect_torchs_bytes(pictures(1, 37, 31), everywhere(op, np.array([8.0]), np.array([1.0])))


def test_the_whole_chain_uses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, batch, cpu = augment_recipe("fat", size=13), 8, torch.device("cpu")
    params = draw(recipe, seed=3, epoch=0, ids=np.arange(batch), heights=[64] * batch, widths=[64] * batch)
    images = torch.from_numpy(pictures(batch, 13, 13))
    calls, operate = [], randaugment.operate

    def counted(images: Tensor, *args: object, **options: object) -> Tensor:
        calls.append(len(images))
        return operate(images, *args, **options)

    monkeypatch.setattr(randaugment, "operate", counted)
    ours = BatchAugment(recipe, cpu, flip=True)(images, params)
    assert calls == [batch]
    monkeypatch.setenv("FAT_KERNELS", "off")
    exact = BatchAugment(recipe, cpu, flip=True)(images, params)
    assert calls == [batch]
    torch.testing.assert_close(ours, exact, rtol=1e-6, atol=1e-6)


def test_nothing_is_launched_where_nothing_is_to_be_done() -> None:
    recipe = augment_recipe("light", size=8)
    params = draw(recipe, seed=3, epoch=0, ids=np.arange(2), heights=[64] * 2, widths=[64] * 2)
    images = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
    assert randaugment.operate(images, params, FILL, flip=False) is images

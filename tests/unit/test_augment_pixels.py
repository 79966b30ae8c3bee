"""Augmented batches (pipeline/augment/pixels.py): parity, independence of the batch, strides, no synchronization."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from pipeline.augment import reference
from pipeline.augment.ops import Op
from pipeline.augment.params import SampleParams, draw, mix_params
from pipeline.augment.pixels import BatchAugment, normalize
from pipeline.augment.recipe import AugmentRecipe, augment_recipe
from pipeline.augment.torch_impl.mix import mix
from pipeline.augment.transfer import upload

CPU = torch.device("cpu")
TIMM = np.load(Path(__file__).parents[1] / "fixtures" / "timm_recipe.npz")
PHOTOS = [TIMM["photo0"], TIMM["photo1"]]


def sources(count: int) -> list[Image.Image]:
    return [Image.fromarray(PHOTOS[i % 2]).resize((160 + i, 200 - i)) for i in range(count)]


def batch(recipe: AugmentRecipe, count: int, *, flipped: bool = True) -> tuple[torch.Tensor, SampleParams]:
    """Decoded photos, cropped and resized by PIL, and their parameters."""
    images = sources(count)
    params = draw(
        recipe,
        seed=1,
        epoch=2,
        ids=np.arange(count) * 97,
        heights=np.array([image.height for image in images]),
        widths=np.array([image.width for image in images]),
    )
    done = params if flipped else replace(params, flips=np.zeros(count, dtype=bool))
    pixels = [np.asarray(reference.crop(image, recipe, done, i)) for i, image in enumerate(images)]
    return torch.from_numpy(np.stack(pixels)), params


BUSY = augment_recipe("fat", size=96, erase=0.5)


@pytest.mark.parametrize("name", ["fat", "light", "none"])
def test_samples_equal_the_reference(name: str) -> None:
    """Crop, flip, RandAugment, normalize, erase. Most samples agree up to float32 rounding. In the others, a geometric
    operation changes a few pixels by one level, which a second operation may double."""
    recipe = augment_recipe(name, size=96)
    count = 64
    images, params = batch(recipe, count)
    ours = BatchAugment(recipe, CPU)(images, params).numpy()
    theirs = np.stack([reference.reference_sample(image, recipe, params, i) for i, image in enumerate(sources(count))])
    level = 1 / (255 * np.array(recipe.std))[:, None, None]
    difference = np.abs(ours - theirs) / level
    assert difference.max() < 2.01
    assert difference.mean() < 1e-3
    assert np.median(difference.reshape(count, -1).max(axis=1)) < 1e-4


def test_flips_are_applied_if_requested() -> None:
    flipped, params = batch(BUSY, 16)
    straight, _ = batch(BUSY, 16, flipped=False)
    assert not torch.equal(flipped, straight)
    one = BatchAugment(BUSY, CPU)(flipped, params)
    other = BatchAugment(BUSY, CPU, flip=True)(straight, params)
    assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["fat", "light"])
def test_a_batch_is_channels_last_in_the_requested_dtype(name: str, dtype: torch.dtype) -> None:
    recipe = augment_recipe(name, size=96)
    images, params = batch(recipe, 8)
    result = BatchAugment(recipe, CPU, dtype)(images, params)
    assert result.shape == (8, 3, 96, 96)
    assert result.dtype == dtype
    assert result.is_contiguous(memory_format=torch.channels_last)
    exact = BatchAugment(recipe, CPU)(images, params)
    assert torch.equal(result, exact.to(dtype))


def test_the_pixels_of_a_sample_do_not_depend_on_its_batch_or_the_threads() -> None:
    images, params = batch(BUSY, 24)
    augment = BatchAugment(BUSY, CPU)
    whole = augment(images, params)
    order = np.random.default_rng(0).permutation(24)
    assert torch.equal(augment(images[order], params.take(order)), whole[order])
    for start, stop in ((0, 1), (5, 6), (7, 16)):
        part = augment(images[start:stop], params.take(slice(start, stop)))
        assert torch.equal(part, whole[start:stop])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(augment(images, params), whole)
    finally:
        torch.set_num_threads(threads)


def test_the_input_pixels_are_not_modified() -> None:
    images, params = batch(BUSY, 16)
    before = images.clone()
    BatchAugment(BUSY, CPU, flip=True)(images, params)
    assert torch.equal(images, before)


@pytest.mark.parametrize("shape", [(3, 96, 96, 3), (4, 96, 80, 3), (4, 3, 96, 96)])
def test_another_shape_is_rejected(shape: tuple[int, ...]) -> None:
    _, params = batch(BUSY, 4)
    with pytest.raises(ValueError, match=r"expected uint8 \[4, 96, 96, 3\], got"):
        BatchAugment(BUSY, CPU)(torch.zeros(shape, dtype=torch.uint8), params)


def test_no_result_is_read_back_from_the_device() -> None:
    """The meta device has shapes but no values, so reading a value would raise."""
    meta = torch.device("meta")
    _, params = batch(BUSY, 32)
    assert set(params.ops[params.applied]) == set(Op)
    images = torch.empty(32, 96, 96, 3, dtype=torch.uint8, device=meta)
    result = BatchAugment(BUSY, meta, torch.bfloat16, flip=True)(images, params)
    mixed = mix(result, mix_params(BUSY, seed=0, step=0, lanes=np.arange(32) // 2))
    assert mixed.shape == (32, 3, 96, 96)
    assert mixed.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_the_same_samples_without_synchronizing() -> None:
    gpu = torch.device("cuda")
    images, params = batch(BUSY, 64)
    augment = BatchAugment(BUSY, gpu, torch.float32)
    there = images.to(gpu)
    augment(there, params)  # fills the caches
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = mix(augment(there, params), mix_params(BUSY, seed=0, step=0, lanes=np.arange(64) // 2))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = mix(BatchAugment(BUSY, CPU)(images, params), mix_params(BUSY, seed=0, step=0, lanes=np.arange(64) // 2))
    # A level is about .0175 after normalization. float32 sums differ by rounding, which rarely changes a truncation.
    difference = (result.cpu() - expected).abs()
    assert difference.max() < 0.02
    assert difference.mean() < 1e-4


def test_normalization_is_within_rounding_of_the_formula() -> None:
    images = torch.from_numpy(PHOTOS[0][None])
    recipe = augment_recipe("light")
    expected = (images.double() / 255 - torch.tensor(recipe.mean)) / torch.tensor(recipe.std)
    result = normalize(images, recipe.mean, recipe.std, torch.float32)
    torch.testing.assert_close(result.permute(0, 2, 3, 1).double(), expected, rtol=0, atol=1e-6)


def test_upload_keeps_shapes_dtypes_and_values() -> None:
    arrays: list[NDArray[np.generic]] = [
        np.arange(5),
        np.array([[1.5, 2.5]]),
        np.array([True, False, True]),
        np.zeros((0, 4), np.int32),
        np.arange(7, dtype=np.uint8),
        np.arange(12, dtype=np.float32).reshape(3, 4)[:, ::2],
    ]
    for array, tensor in zip(arrays, upload(arrays, CPU), strict=True):
        assert np.array_equal(array, tensor.numpy())
        assert array.dtype == tensor.numpy().dtype
    (words,) = upload([np.array([2**64 - 1], dtype=np.uint64)], CPU)
    assert words.tolist() == [-1]

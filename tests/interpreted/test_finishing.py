"""The kernel of normalization, erasing, mixing and cast computes the same as PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.augment import kernels
from pipeline.augment.params import draw, mix_params
from pipeline.augment.pixels import BatchAugment
from pipeline.augment.recipe import augment_recipe

BATCH = 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mixes", [False, True])
def test_the_kernel_computes_the_same_as_torch(mixes: bool, dtype: torch.dtype) -> None:
    recipe = augment_recipe("fat", size=37, rand_augment=None, erase=0.7)
    side = np.full(BATCH, 64)
    params = draw(recipe, seed=3, epoch=1, ids=np.arange(BATCH), heights=side, widths=side)
    mixing = mix_params(recipe, seed=3, step=2, lanes=np.arange(BATCH) // 2) if mixes else None
    erased = params.erase_boxes[:, 2] > 0
    assert erased.any()
    assert not erased.all()
    assert mixing is None or 0 < mixing.use_cutmix.mean() < 1
    images = torch.randint(256, (BATCH, 37, 37, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    found = BatchAugment(recipe, torch.device("cpu"), dtype)(images, params, mixing)
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    with kernels.disabled(kernels.FINISHING):
        exact = BatchAugment(recipe, torch.device("cpu"), torch.float32)(images, params, mixing)
    allowed = torch.finfo(dtype).eps * exact.abs() + 2.0**-21 * exact.abs().max()
    assert ((found.float() - exact).abs() <= allowed).all()


def test_mixing_a_batch_with_an_odd_number_of_images_is_rejected() -> None:
    recipe = augment_recipe("fat", size=8, rand_augment=None)
    side = np.full(3, 64)
    params = draw(recipe, seed=3, epoch=1, ids=np.arange(3), heights=side, widths=side)
    mixing = mix_params(recipe, seed=3, step=2, lanes=np.zeros(4, np.int64))
    with pytest.raises(ValueError, match=r"expected an even number of .* got 3 images and 4 parameters"):
        BatchAugment(recipe, torch.device("cpu"))(torch.zeros(3, 8, 8, 3, dtype=torch.uint8), params, mixing)

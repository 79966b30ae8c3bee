"""Properties of mixup and CutMix on pixels and targets (pipeline/augment/torch_impl/mix.py)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.augment.params import MixParams, mix_params
from pipeline.augment.recipe import augment_recipe
from pipeline.augment.torch_impl.mix import mix, mix_targets

SIZE = 32


def images(count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    values = torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    return values.to(dtype, memory_format=torch.channels_last)


def params(count: int, step: int = 0, **overrides: float) -> MixParams:
    recipe = augment_recipe("fat", size=SIZE, **overrides)
    return mix_params(recipe, seed=0, step=step, lanes=np.arange(count) // 4)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 500))
def test_each_row_equals_the_definition_of_mixup_or_cutmix(step: int) -> None:
    """Compared with a loop over the rows that follows the papers of mixup and CutMix."""
    x, draws = images(16), params(16, step)
    mixed = mix(x, draws)
    for row in range(16):
        own, partner = x[row], x[row ^ 1]
        if draws.use_cutmix[row]:
            y, left, h, w = draws.box[row]
            expected = own.clone()
            expected[:, y : y + h, left : left + w] = partner[:, y : y + h, left : left + w]
            assert torch.equal(mixed[row], expected)
        else:
            lam = draws.lam[row]
            torch.testing.assert_close(mixed[row], lam * own + (1 - lam) * partner, rtol=1e-6, atol=1e-6)


def test_lambda_is_the_fraction_of_pixels_that_cutmix_keeps() -> None:
    draws = params(64, mixup=0.0)
    own = torch.arange(64.0).view(64, 1, 1, 1).expand(64, 3, SIZE, SIZE)
    kept = (mix(own, draws) == own).float().mean(dim=(1, 2, 3))
    torch.testing.assert_close(kept, torch.from_numpy(draws.lam))


def test_micro_batches_are_mixed_like_the_whole_batch() -> None:
    x, draws = images(32), params(32)
    whole = mix(x, draws)
    for rows in (slice(0, 2), slice(2, 8), slice(8, 32)):
        assert torch.equal(mix(x[rows], draws.take(rows)), whole[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_and_strides_are_kept_and_the_sum_is_rounded_at_most_twice(dtype: torch.dtype) -> None:
    x, draws = images(16, dtype), params(16)
    before = x.clone()
    mixed = mix(x, draws)
    assert mixed.dtype == dtype
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    unit = torch.finfo(dtype).eps * x.float().abs().max()
    assert (mixed.float() - mix(x.float(), draws)).abs().max() <= unit
    assert torch.equal(x, before)


def test_rows_are_unchanged_if_both_alphas_are_zero() -> None:
    x = images(8)
    assert torch.equal(mix(x, params(8, mixup=0.0, cutmix=0.0)), x)


@pytest.mark.parametrize(("rows", "drawn"), [(3, 3), (4, 6)])
def test_odd_batches_and_parameters_of_another_length_are_rejected(rows: int, drawn: int) -> None:
    with pytest.raises(ValueError, match=rf"expected an even number of .* got {rows} images and {drawn} parameters"):
        mix(images(rows), params(drawn))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_targets_have_the_same_weights_as_the_pixels(smoothing: float) -> None:
    labels = torch.tensor([3, 1, 4, 4, 0, 2])
    lam = torch.tensor([0.7, 0.7, 0.2, 0.2, 1.0, 1.0])
    targets = mix_targets(labels, lam, 5, smoothing)
    assert targets.dtype == torch.float32
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(6))
    smooth = torch.nn.functional.one_hot(labels, 5) * (1 - smoothing) + smoothing / 5
    partner = smooth[[1, 0, 3, 2, 5, 4]]
    torch.testing.assert_close(targets, lam[:, None] * smooth + (1 - lam[:, None]) * partner)


def test_cross_entropy_with_unmixed_targets_equals_torch_with_label_smoothing() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(8, 10, generator=generator), torch.arange(8)
    targets = mix_targets(labels, torch.ones(8), 10, 0.1)
    ours = -(targets * logits.log_softmax(dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(ours, torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1))

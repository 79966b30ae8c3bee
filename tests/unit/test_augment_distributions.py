"""Distributions of the augmentation parameters, compared with timm's and the paper's recipe, with fixed seeds."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from pipeline.augment.ops import Op
from pipeline.augment.params import SampleParams, cutmix_box, draw, mix_params
from pipeline.augment.recipe import AugmentRecipe, augment_recipe

TIMM = np.load(Path(__file__).parents[1] / "fixtures" / "timm_recipe.npz")
DISTRIBUTIONS = json.loads(str(TIMM["distributions"]))
PERCENT = DISTRIBUTIONS["percentiles"]
FAT = augment_recipe("fat")
MANY = 20_000


def drawn(recipe: AugmentRecipe, count: int = MANY, height: int = 375, width: int = 500) -> SampleParams:
    ids = np.arange(count)
    return draw(recipe, seed=0, epoch=0, ids=ids, heights=np.full(count, height), widths=np.full(count, width))


def test_crops_have_the_distribution_of_timm() -> None:
    y, x, h, w = drawn(FAT).windows.T.astype(float)
    compare = {
        "rrc area fraction percentiles (500x375)": (h * w / (375 * 500), 0.015),
        "rrc log aspect percentiles": (np.log(w / h), 0.015),
        "rrc left/(W-w) percentiles": ((x / np.maximum(500 - w, 1))[w < 500], 0.02),
    }
    for name, (values, tolerance) in compare.items():
        np.testing.assert_allclose(np.percentile(values, PERCENT), DISTRIBUTIONS[name], atol=tolerance, err_msg=name)
    top = (y / np.maximum(375 - h, 1))[h < 375]
    np.testing.assert_allclose(np.percentile(top, PERCENT), np.array(PERCENT) / 100, atol=0.02)


def test_erase_boxes_have_the_distribution_of_timm() -> None:
    boxes = drawn(augment_recipe("fat", size=56)).erase_boxes
    area = boxes[:, 2] * boxes[:, 3] / 56**2
    touched = area > 0
    assert abs(touched.mean() - DISTRIBUTIONS["erasing: share of images touched"]) < 0.012
    theirs = DISTRIBUTIONS["erasing: area percentiles of those (56x56)"]
    np.testing.assert_allclose(np.percentile(area[touched], PERCENT), theirs, atol=0.01)
    y, x, h, w = boxes[touched].T
    assert (y + h <= 56).all()
    assert (x + w <= 56).all()
    assert abs(np.median(np.log(h / w))) < 0.1


def test_half_of_the_images_are_flipped() -> None:
    assert abs(drawn(FAT).flips.mean() - 0.5) < five_sigma(0.5)
    assert not drawn(augment_recipe("fat", flip=0.0)).flips.any()
    assert drawn(augment_recipe("fat", flip=1.0)).flips.all()


def test_operations_are_drawn_uniformly_with_replacement_and_applied_half_the_time() -> None:
    params = drawn(FAT)
    assert params.ops.shape == (MANY, 2)
    for layer in range(2):
        counts = np.bincount(params.ops[:, layer], minlength=15)
        assert len(counts) == 15
        assert ((counts - MANY / 15) ** 2 / (MANY / 15)).sum() < 15 + 5 * math.sqrt(30)
        assert abs(params.applied[:, layer].mean() - 0.5) < five_sigma(0.5)
    same = (params.ops[:, 0] == params.ops[:, 1]).mean()
    both = params.applied.all(axis=1).mean()
    assert abs(same - 1 / 15) < five_sigma(1 / 15)
    assert abs(both - 0.25) < five_sigma(0.25)


def test_magnitudes_are_normal_with_mean_nine_and_clipped_at_ten() -> None:
    magnitudes = drawn(FAT).magnitudes.ravel()
    assert magnitudes.max() == 10.0
    assert abs((magnitudes == 10.0).mean() - 0.02275) < 0.005  # two standard deviations above the mean
    np.testing.assert_allclose(np.percentile(magnitudes, [2.5, 16, 50, 84]), [8.02, 8.503, 9, 9.497], atol=0.02)


def test_an_mstd_above_100_gives_uniform_magnitudes() -> None:
    magnitudes = drawn(augment_recipe("fat", rand_augment="rand-m8-mstd101-inc1")).magnitudes
    np.testing.assert_allclose(np.percentile(magnitudes, [10, 50, 90]), [0.8, 4.0, 7.2], atol=0.1)


def test_both_signs_are_equally_likely_and_two_percent_of_posterized_images_are_black() -> None:
    params = drawn(FAT)
    for op in (Op.ROTATE, Op.SHEAR_X, Op.TRANSLATE_Y):
        signs = params.arguments[params.ops == op] > 0
        assert abs(signs.mean() - 0.5) < five_sigma(0.5, len(signs))
    bits = params.arguments[params.ops == Op.POSTERIZE]
    assert set(np.unique(bits)) == {0.0, 1.0, 2.0}  # 2: three standard deviations below the mean magnitude
    assert abs((bits == 0).mean() - 0.02275) < five_sigma(0.02275, len(bits))


def test_mixup_and_cutmix_are_equally_likely_and_their_weights_have_the_right_distribution() -> None:
    params = mix_params(FAT, seed=0, step=0, lanes=np.arange(MANY))
    cut = params.use_cutmix
    assert abs(cut.mean() - 0.5) < five_sigma(0.5)
    assert not params.box[~cut].any()
    mixed = params.lam[~cut].astype(float)
    assert abs(mixed.mean() - 0.5) < 0.02
    assert abs(mixed.var() - 1 / (4 * 2.6)) < 0.003  # of Beta(.8, .8)
    area = params.box[cut, 2] * params.box[cut, 3] / 224**2
    np.testing.assert_allclose(params.lam[cut], 1 - area, atol=1e-6)


@pytest.mark.parametrize(
    ("override", "cut_share", "mixes"),
    [
        ({"cutmix": 0.0}, 0.0, True),
        ({"mixup": 0.0}, 1.0, True),
        ({"mix_switch": 0.2}, 0.2, True),
        ({"mixup": 0.0, "cutmix": 0.0}, 0.0, False),
    ],
)
def test_mixup_and_cutmix_can_each_be_turned_off(override: dict[str, float], cut_share: float, mixes: bool) -> None:
    recipe = augment_recipe("fat", **override)
    params = mix_params(recipe, seed=0, step=0, lanes=np.arange(5000))
    assert abs(params.use_cutmix.mean() - cut_share) <= five_sigma(cut_share, 5000)
    assert recipe.mixes == mixes
    assert (params.lam == 1).all() != mixes


@pytest.mark.parametrize("row", TIMM["cutmix: lam cy cx yl yh xl xh corrected lam"].tolist())
def test_cutmix_boxes_and_weights_equal_those_of_timm(row: list[float]) -> None:
    lam, cy, cx, top, bottom, left, right, corrected = row
    box, kept = cutmix_box(np.array([lam]), np.array([[int(cy), int(cx)]]), 224)
    assert box.tolist() == [[top, left, bottom - top, right - left]]
    assert kept[0] == pytest.approx(corrected, abs=1e-12)


def test_cutmix_boxes_have_a_uniform_area_and_a_uniform_center() -> None:
    """Compared with the same distribution from NumPy's generator."""
    params = mix_params(augment_recipe("fat", mixup=0.0), seed=0, step=0, lanes=np.arange(MANY))
    generator = np.random.default_rng(0)
    _, kept = cutmix_box(generator.uniform(size=MANY), generator.integers(0, 224, (MANY, 2)), 224)
    share = np.linspace(0.05, 0.95, 19)
    np.testing.assert_allclose(np.quantile(params.lam, share), np.quantile(kept, share), atol=0.015)


def five_sigma(share: float, count: int = MANY) -> float:
    return 5 * math.sqrt(share * (1 - share) / count)

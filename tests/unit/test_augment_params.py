"""Properties and golden values of the augmentation parameters (pipeline/augment/params.py)."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.augment.describe import describe
from pipeline.augment.params import SampleParams, crop_windows, draw, mix_params, mix_params_of_steps
from pipeline.augment.recipe import AugmentRecipe, augment_recipe

FAT = augment_recipe("fat")


def drawn(recipe: AugmentRecipe, count: int = 100, height: int = 375, width: int = 500) -> SampleParams:
    ids = np.arange(count)
    return draw(recipe, seed=0, epoch=0, ids=ids, heights=np.full(count, height), widths=np.full(count, width))


@settings(deadline=None)
@given(st.permutations(range(24)), st.integers(1, 24), st.integers(0, 2**40), st.integers(0, 1000))
def test_the_parameters_of_a_sample_depend_on_its_id_only(order: list[int], count: int, seed: int, epoch: int) -> None:
    """They do not depend on the other samples of the batch or on their order."""
    ids = np.arange(24) * 1_000_003
    heights, widths = 100 + np.arange(24) * 20, 600 - np.arange(24) * 20
    rows = np.array(order[:count])
    whole = draw(FAT, seed=seed, epoch=epoch, ids=ids, heights=heights, widths=widths).take(rows)
    part = draw(FAT, seed=seed, epoch=epoch, ids=ids[rows], heights=heights[rows], widths=widths[rows])
    assert_equal(whole, part)


@pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 1}])
def test_seed_and_epoch_change_every_parameter(change: dict[str, int]) -> None:
    ids = np.arange(200)
    base = {"seed": 0, "epoch": 0, "ids": ids, "heights": ids + 300, "widths": ids + 300}
    one, other = draw(FAT, **base), draw(FAT, **(base | change))
    for field in fields(SampleParams):
        same = np.array_equal(getattr(one, field.name), getattr(other, field.name))
        assert same == (field.name == "ids"), field.name


def test_golden_values() -> None:
    """Different values would change the data of every run."""
    params = draw(
        FAT,
        seed=7,
        epoch=3,
        ids=np.array([0, 5, 123456789]),
        heights=np.array([375, 500, 20]),
        widths=np.array([500, 333, 600]),
    )
    assert params.windows.tolist() == [[101, 3, 243, 226], [104, 13, 393, 297], [0, 286, 20, 27]]
    assert params.flips.tolist() == [True, True, False]
    assert params.ops.tolist() == [[6, 12], [1, 5], [9, 4]]
    assert params.arguments.tolist() == [[92.0, 0.2618727924547169], [0.0, 35.0], [1.8631299676804025, 1.0]]
    assert params.erase_keys.tolist() == [4485425703127696135, 2068283492698211590, 13574250255807092285]
    lam = mix_params(FAT, seed=7, step=11, lanes=np.arange(4)).lam
    assert lam.tolist() == np.float32([0.99363166, 0.39523488, 0.51662225, 0.26747444]).tolist()


sides = st.integers(1, 3000)
unit = st.floats(0.01, 1.0)


@settings(deadline=None)
@given(
    heights=st.lists(sides, min_size=1, max_size=8),
    width=sides,
    scale=st.tuples(unit, unit),
    ratio=st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)),
    crop=st.sampled_from(["random", "center"]),
)
@example(heights=[100], width=1, scale=(1.0, 1.0), ratio=(3.0, 4.0), crop="random")
@example(heights=[1], width=100, scale=(1.0, 1.0), ratio=(0.25, 0.3), crop="random")
def test_every_crop_window_is_inside_its_image(
    heights: list[int], width: int, scale: tuple[float, float], ratio: tuple[float, float], crop: str
) -> None:
    low, high = sorted(scale)
    narrow, wide = sorted(ratio)
    recipe = augment_recipe("light", scale=(low, high), ratio=(narrow, wide), crop=crop)
    n = len(heights)
    windows = crop_windows(
        recipe, seed=1, epoch=2, ids=np.arange(n), heights=np.array(heights), widths=np.full(n, width)
    )
    y, x, h, w = windows.T
    assert windows.dtype == np.int32
    assert (windows[:, 2:] >= 1).all()
    assert (y >= 0).all()
    assert (x >= 0).all()
    assert (y + h <= heights).all()
    assert (x + w <= width).all()


@pytest.mark.parametrize(("height", "width", "expected"), [(60, 2000, (0, 960, 60, 80)), (2000, 60, (960, 0, 80, 60))])
def test_if_no_drawn_crop_fits_the_window_is_centered_with_a_permitted_ratio(
    height: int, width: int, expected: tuple[int, ...]
) -> None:
    recipe = augment_recipe("light", scale=(0.9, 1.0))
    assert (drawn(recipe, 50, height, width).windows == expected).all()


def test_the_recipe_none_uses_the_center_crop_of_evaluation() -> None:
    params = drawn(augment_recipe("none"), 50, 375, 500)
    assert (params.windows == (23, 86, 328, 328)).all()
    assert not params.flips.any()
    assert params.ops.shape == (50, 0)
    assert not params.erase_boxes.any()


def test_crops_are_the_same_at_every_training_size() -> None:
    small, large = (drawn(augment_recipe("fat", size=size), 100).windows for size in (96, 384))
    assert np.array_equal(small, large)


def test_all_rows_of_a_lane_have_the_same_mixing_in_any_batch() -> None:
    lanes = np.repeat(np.arange(64), 16)
    whole = mix_params(FAT, seed=3, step=17, lanes=lanes)
    for start, stop in ((0, 1024), (0, 16), (512, 768), (1008, 1024), (6, 8)):
        part = mix_params(FAT, seed=3, step=17, lanes=lanes[start:stop])
        assert_equal(whole.take(slice(start, stop)), part)
    assert len(np.unique(whole.lam)) > 60  # corrected CutMix weights are sometimes equal


def test_seed_step_and_lane_each_change_the_mixing() -> None:
    lanes = np.arange(8)
    draws = [mix_params(FAT, seed=seed, step=step, lanes=lanes).lam for seed in (0, 1) for step in (0, 1)]
    assert len(set(np.concatenate(draws).tolist())) == 32


@pytest.mark.parametrize("recipe", [FAT, augment_recipe("fat", cutmix=0.0), augment_recipe("fat", mixup=0.0)])
def test_mixing_drawn_for_several_steps_equals_mixing_drawn_step_by_step(recipe: AugmentRecipe) -> None:
    lanes = np.repeat([7, 3, 40], 4)
    for step, at_once in enumerate(mix_params_of_steps(recipe, seed=3, steps=range(16, 32), lanes=lanes), start=16):
        assert_equal(mix_params(recipe, seed=3, step=step, lanes=lanes), at_once)


def test_the_description_of_a_sample_lists_its_operations() -> None:
    params = drawn(augment_recipe("fat", erase=1.0), 300)
    words = ", ".join(describe(params, i) for i in range(300)).split(", ")
    for start in ("flip", "Rotate -", "Posterize 1-bit", "Solarize from 2", "TranslateX +", "AutoContrast", "erase 1"):
        assert any(word.startswith(start) for word in words), start
    assert describe(drawn(augment_recipe("none"), 1), 0) == "plain"


def assert_equal(one: object, other: object) -> None:
    for field in fields(one):  # type: ignore[arg-type]
        np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name), err_msg=field.name)

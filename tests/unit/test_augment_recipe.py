"""Named recipes, RandAugment policies, arguments of operations (pipeline/augment/recipe.py, ops.py)."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.augment.ops import Op, arguments
from pipeline.augment.recipe import RandAugment, augment_recipe, parse_rand_augment
from shards.errors import UserError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rand-m9-mstd0.5-inc1", RandAugment(magnitude=9, std=0.5, increasing=True)),
        ("rand", RandAugment()),
        ("rand-n3-m7-p0.3", RandAugment(layers=3, magnitude=7, probability=0.3)),
        ("rand-mstd101-m5", RandAugment(magnitude=5, std=101.0)),
    ],
)
def test_rand_augment_policies_are_parsed_in_timms_syntax(text: str, expected: RandAugment) -> None:
    assert parse_rand_augment(text) == expected


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("augmix-m3", "'augmix'"),
        ("rand-m9-foo2", "'foo2'"),
        ("rand-m9.5", "'m9.5'"),
        ("rand--m9", "''"),
        ("rand-inc0", "'inc0'"),
        ("rand-m11", "m up to 10"),
        ("rand-n17", "n up to 16"),
        ("rand-mstd1001", "mstd up to 1,000"),
        ("rand-m" + "9" * 5000, "unknown part"),
        ("rand-mnan", "unknown part"),
        ("rand-p1.5", "p up to 1"),
    ],
)
def test_an_invalid_part_of_a_policy_is_named(text: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        augment_recipe("light", rand_augment=text)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ({"size": 0}, "size is 0"),
        ({"scale": (0.5, 0.2)}, "scale is"),
        ({"ratio": (0.0, 1.0)}, "ratio is"),
        ({"flip": 1.5}, "flip is 1.5"),
        ({"erase": -0.1}, "erase is -0.1"),
        ({"mixup": -1.0}, "mixup is -1.0"),
        ({"std": (1.0, 0.0, 1.0)}, "std is"),
        ({"fill": (0, 0, 256)}, "fill is"),
        ({"crop": "middle"}, "crop is middle"),
    ],
)
def test_a_value_out_of_range_is_named(override: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        augment_recipe("fat", **override)


def test_the_message_for_an_unknown_recipe_lists_the_known_recipes() -> None:
    with pytest.raises(UserError, match="'heavy': expected one of fat, light, none"):
        augment_recipe("heavy")


# Operation, magnitude, and its arguments with sign -1 and with sign +1.
INCREASING = [
    (Op.AUTO_CONTRAST, 9, 0, 0),
    (Op.EQUALIZE, 9, 0, 0),
    (Op.INVERT, 9, 0, 0),
    (Op.ROTATE, 9, -27, 27),
    (Op.POSTERIZE, 9, 1, 1),
    (Op.POSTERIZE, 10, 0, 0),
    (Op.SOLARIZE, 9, 26, 26),
    (Op.SOLARIZE, 10, 0, 0),
    (Op.SOLARIZE_ADD, 9, 99, 99),
    (Op.COLOR, 9, 0.19, 1.81),
    (Op.CONTRAST, 10, 0.1, 1.9),
    (Op.BRIGHTNESS, 5, 0.55, 1.45),
    (Op.SHARPNESS, 0, 1, 1),
    (Op.SHEAR_X, 9, -0.27, 0.27),
    (Op.SHEAR_Y, 10, -0.3, 0.3),
    (Op.TRANSLATE_X, 10, -0.45, 0.45),
    (Op.TRANSLATE_Y, 2, -0.09, 0.09),
]
PLAIN = [
    (Op.POSTERIZE, 9, 3, 3),
    (Op.SOLARIZE, 9, 230, 230),
    (Op.COLOR, 9, 1.72, 1.72),
    (Op.SHARPNESS, 0, 0.1, 0.1),
    (Op.ROTATE, 9, -27, 27),
]


@pytest.mark.parametrize(
    ("op", "magnitude", "negative", "positive", "increasing"),
    [(*row, True) for row in INCREASING] + [(*row, False) for row in PLAIN],
)
def test_arguments_of_operations(op: Op, magnitude: float, negative: float, positive: float, increasing: bool) -> None:
    got = arguments(np.array([op, op]), np.full(2, float(magnitude)), np.array([-1.0, 1.0]), increasing=increasing)
    np.testing.assert_allclose(got, [negative, positive], rtol=1e-12)

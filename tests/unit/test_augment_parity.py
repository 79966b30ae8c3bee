"""RandAugment's operations, compared with timm and PIL (pipeline/augment: tables, blend, geometry)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from pipeline.augment import reference
from pipeline.augment.ops import Op, arguments
from pipeline.augment.pixels import OP_GROUPS
from pipeline.augment.torch_impl import geometry

CPU = torch.device("cpu")
TIMM = np.load(Path(__file__).parents[1] / "fixtures" / "timm_recipe.npz")
PHOTOS = [TIMM["photo0"], TIMM["photo1"]]
FILL = (124, 116, 104)
GEOMETRIC = (Op.ROTATE, Op.SHEAR_X, Op.SHEAR_Y, Op.TRANSLATE_X, Op.TRANSLATE_Y)
# Bounds in levels, over whole images including the filled border; the largest measured mean is .0023. PIL computes in
# float64 and truncates; in float32, sums that should be integers are sometimes slightly smaller.
GEOMETRIC_MEAN, GEOMETRIC_MAX = 0.005, 1


def operate(images: NDArray[np.uint8], op: Op, argument: float) -> NDArray[np.int64]:
    """Apply one operation to uint8 [n, H, W, 3]."""
    group = next(group for group in OP_GROUPS if op in group.ops)
    ops, values = np.full(len(images), op), np.full(len(images), argument)
    if op in GEOMETRIC:
        arrays = [geometry.matrices(ops, values, *images.shape[1:3])]
    else:
        arrays = group.prepare(ops, values, images.shape[1])
    result = group.run(torch.from_numpy(images.copy()), [torch.from_numpy(array) for array in arrays], FILL)
    assert result.dtype == torch.uint8
    return result.numpy().astype(np.int64)


def assert_close(op: Op, ours: NDArray[np.int64], theirs: NDArray[np.integer], what: str) -> None:
    difference = np.abs(ours - theirs.astype(np.int64))
    if op in GEOMETRIC:
        assert difference.mean() <= GEOMETRIC_MEAN, what
        assert difference.max() <= GEOMETRIC_MAX, what
    else:
        assert difference.max() == 0, what


@pytest.mark.parametrize("op", Op, ids=lambda op: op.title)
def test_every_operation_equals_timm(op: Op) -> None:
    """At every magnitude and sign of the fixture."""
    names = (f"{op.title}", f"{op.title}Increasing", f"{op.title}Rel")
    cases = [key for key in TIMM if key.startswith("op/") and key.split("/")[2] in names]
    assert len(cases) >= 2
    for key in cases:
        _, photo, _, magnitude, sign = key.split("/")
        argument = arguments(
            np.array([op]), np.array([float(magnitude)]), np.array([1.0 if sign == "+" else -1.0]), increasing=True
        )
        ours = operate(PHOTOS[int(photo)][None], op, float(argument[0]))[0]
        assert_close(op, ours, TIMM[key], key)


@pytest.mark.parametrize("op", Op, ids=lambda op: op.title)
def test_every_operation_equals_pil_at_the_training_size(op: Op) -> None:
    photos = [Image.fromarray(photo).resize((224, 224), Image.Resampling.BICUBIC) for photo in PHOTOS]
    stack = np.stack([np.asarray(photo) for photo in photos])
    for magnitude, sign in ((0.0, 1.0), (3.3, -1.0), (8.9, 1.0), (10.0, -1.0)):
        argument = float(arguments(np.array([op]), np.array([magnitude]), np.array([sign]), increasing=True)[0])
        theirs = np.stack([np.asarray(reference.apply(photo, op, argument, FILL)) for photo in photos])
        assert_close(op, operate(stack, op, argument), theirs, f"{op.title} {argument}")


FLAT = np.full((1, 8, 8, 3), 77, np.uint8)
TWO_VALUES = np.tile(np.uint8([[[3], [250]], [[250], [250]]]), (1, 4, 4, 3))
TINY = np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3) * 20


@pytest.mark.parametrize("op", Op, ids=lambda op: op.title)
@pytest.mark.parametrize("image", [FLAT, TWO_VALUES, TINY], ids=["flat", "two values", "2 x 2"])
def test_degenerate_images_equal_pil(op: Op, image: NDArray[np.uint8]) -> None:
    argument = float(arguments(np.array([op]), np.array([9.0]), np.array([-1.0]), increasing=True)[0])
    theirs = np.asarray(reference.apply(Image.fromarray(image[0]), op, argument, FILL))
    ours = operate(image, op, argument)[0]
    assert np.abs(ours - theirs.astype(np.int64)).max() <= (1 if op in GEOMETRIC else 0)


def test_posterize_to_no_bits_is_black() -> None:
    assert not operate(PHOTOS[0][None], Op.POSTERIZE, 0.0).any()


@pytest.mark.parametrize("constant", [-0.5, -0.75], ids=["PIL's resize", "torch's grid_sample"])
def test_the_bounds_detect_another_cubic_kernel(constant: float) -> None:
    """A rotation with another kernel constant exceeds the bounds by far."""
    photo = Image.fromarray(PHOTOS[0])
    theirs = np.asarray(reference.apply(photo, Op.TRANSLATE_X, 0.105, FILL)).astype(np.int64)
    shift = 0.105 * photo.width
    whole, t = int(shift), shift - int(shift)
    a = constant
    weights = [
        a * (t - 2 * t**2 + t**3),
        1 - (a + 3) * t**2 + (a + 2) * t**3,
        -a * t + (2 * a + 3) * t**2 - (a + 2) * t**3,
        a * (t**2 - t**3),
    ]
    inner = range(1, photo.width - whole - 3)
    other = sum(w * PHOTOS[0][:, [x + whole + k for x in inner]].astype(float) for k, w in enumerate(weights, start=-1))
    difference = np.abs(np.trunc(np.clip(other, 0, 255)) - theirs[:, inner])
    assert difference.mean() > 10 * GEOMETRIC_MEAN
    assert difference.max() > GEOMETRIC_MAX

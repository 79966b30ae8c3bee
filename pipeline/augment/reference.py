"""Reference implementation of the augmentation of one sample, with PIL and NumPy.

It is slow and simple. Tests and `pipeline look --diff` compare the augmented batches with it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from pipeline import rng
from pipeline.augment.ops import Op
from pipeline.augment.params import SampleParams
from pipeline.augment.recipe import AugmentRecipe
from pipeline.augment.torch_impl.erase import QUANTILES, quantiles
from pipeline.augment.torch_impl.geometry import matrices


def reference_sample(image: Image.Image, recipe: AugmentRecipe, params: SampleParams, i: int) -> NDArray[np.float32]:
    """Augment sample `i`, without mixing.

    Args:
        image: decoded source image, mode RGB.
        recipe: the augmentation recipe.
        params: parameters of a batch.
        i: row of the sample in `params`.

    Returns:
        float32 [3, size, size], normalized.
    """
    image = rand_augment(crop(image, recipe, params, i), recipe, params, i)
    return erase(normalize(np.asarray(image), recipe), params, i).transpose(2, 0, 1)


def crop(image: Image.Image, recipe: AugmentRecipe, params: SampleParams, i: int) -> Image.Image:
    """Crop, resize (bicubic, antialiased) and flip the source image of sample `i`."""
    y, x, height, width = params.windows[i].tolist()
    size = (recipe.size, recipe.size)
    image = image.crop((x, y, x + width, y + height)).resize(size, Image.Resampling.BICUBIC)
    return ImageOps.mirror(image) if params.flips[i] else image


def rand_augment(image: Image.Image, recipe: AugmentRecipe, params: SampleParams, i: int) -> Image.Image:
    """Apply the operations of RandAugment to a cropped image."""
    for op, argument, applied in zip(params.ops[i], params.arguments[i], params.applied[i], strict=True):
        if applied:
            image = apply(image, Op(op), float(argument), recipe.fill)
    return image


def apply(image: Image.Image, op: Op, argument: float, fill: tuple[int, int, int]) -> Image.Image:
    """Apply one operation, with its argument in the unit of `ops.arguments`."""
    if op in _COLOR:
        return _COLOR[op](image, argument)
    if op == Op.ROTATE:
        return image.rotate(argument, resample=Image.Resampling.BICUBIC, fillcolor=fill)
    coefficients = matrices(np.array([op]), np.array([argument]), image.height, image.width)[0].tolist()
    return image.transform(
        image.size, Image.Transform.AFFINE, coefficients, resample=Image.Resampling.BICUBIC, fillcolor=fill
    )


def normalize(pixels: NDArray[np.uint8], recipe: AugmentRecipe) -> NDArray[np.float32]:
    """Convert uint8 [H, W, 3] to float32, normalized by the recipe's mean and standard deviation."""
    return ((pixels / 255.0 - np.asarray(recipe.mean)) / np.asarray(recipe.std)).astype(np.float32)


def erase(values: NDArray[np.float32], params: SampleParams, i: int) -> NDArray[np.float32]:
    """Apply random erasing to a normalized sample, float32 [size, size, 3], in place."""
    y, x, height, width = params.erase_boxes[i].tolist()
    bits = rng.extend(params.erase_keys[i], np.arange(height * width))
    words = np.stack([bits >> np.uint64(shift) for shift in (0, 16, 32)], axis=1) & np.uint64(QUANTILES - 1)
    values[y : y + height, x : x + width] = quantiles()[words].reshape(height, width, 3)
    return values


def _posterize(image: Image.Image, bits: float) -> Image.Image:
    """Keep the highest `bits` bits. 0 bits is black, which ImageOps.posterize does not accept."""
    return ImageOps.posterize(image, int(bits)) if bits else Image.new("RGB", image.size)


def _solarize_add(image: Image.Image, summand: float) -> Image.Image:
    return image.point([min(255, old + int(summand)) if old < 128 else old for old in range(256)] * 3)


_COLOR: dict[Op, Callable[[Image.Image, float], Image.Image]] = {
    Op.AUTO_CONTRAST: lambda image, _: ImageOps.autocontrast(image),
    Op.EQUALIZE: lambda image, _: ImageOps.equalize(image),
    Op.INVERT: lambda image, _: ImageOps.invert(image),
    Op.POSTERIZE: _posterize,
    Op.SOLARIZE: lambda image, threshold: ImageOps.solarize(image, int(threshold)),
    Op.SOLARIZE_ADD: _solarize_add,
    Op.COLOR: lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    Op.CONTRAST: lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    Op.BRIGHTNESS: lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    Op.SHARPNESS: lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor),
}

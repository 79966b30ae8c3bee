"""The augmentation recipe, and the named recipes: fat, light and none."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Interval
from numpy.typing import NDArray

from shards.errors import UserError

Range = tuple[float, float]
Alpha = Annotated[float, Interval(ge=0, le=100)]
"""Parameter of Beta(alpha, alpha), from which the mixing weight is drawn; 0 turns mixing off."""
CropArea = Annotated[float, Interval(ge=1e-6, le=1)]
"""Area of a crop as a fraction of the image's area."""
MAX_LAYERS = 16  # RandAugment operations per image; each is a pass over the image
MAX_STD = 1000
Color = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class RandAugment:
    """A RandAugment policy (arXiv 1909.13719) in timm's variant, for instance `rand-m9-mstd0.5-inc1`."""

    magnitude: int = 10
    """Mean magnitude, 0 to 10 (`m`)."""
    layers: int = 2
    """Number of operations drawn per image, with replacement, 0 to 16 (`n`)."""
    probability: float = 0.5
    """Probability that a drawn operation is applied (`p`)."""
    std: float = 0.0
    """Standard deviation of the magnitude, which is clipped to 0 to 10. Above 100, the magnitude is uniform between 0
    and the mean (`mstd`)."""
    increasing: bool = False
    """Whether every operation becomes stronger with its magnitude (`inc1`)."""


def parse_rand_augment(text: str) -> RandAugment:
    """Parse timm's syntax: `rand`, then any of -mINT -nINT -pFLOAT -mstdFLOAT -inc1, in any order.

    Raises:
        UserError: a part is invalid or out of range; the message names it.
    """
    head, *parts = text.split("-")
    fields: dict[str, Any] = {}
    for part in parts:
        match = re.fullmatch(r"([a-z]+)(\d{1,9}(?:\.\d{1,17})?)", part, re.ASCII)
        key, value = match.groups() if match else (part, "")
        if key in ("m", "n") and value.isdigit():
            fields["magnitude" if key == "m" else "layers"] = int(value)
        elif key in ("p", "mstd") and value:
            fields["probability" if key == "p" else "std"] = float(value)
        elif part == "inc1":
            fields["increasing"] = True
        else:
            raise UserError(
                f"RandAugment {_short(text)}: unknown part {_short(part)}; expected mINT, nINT, pFLOAT, mstdFLOAT or "
                "inc1"
            )
    if head != "rand":
        raise UserError(
            f"RandAugment {_short(text)}: starts with {_short(head)}; expected 'rand', as in rand-m9-mstd0.5-inc1"
        )
    spec = RandAugment(**fields)
    if spec.magnitude > 10 or spec.probability > 1 or spec.layers > MAX_LAYERS or spec.std > MAX_STD:
        raise UserError(
            f"RandAugment {_short(text)}: expected m up to 10, n up to {MAX_LAYERS}, p up to 1 and mstd up to "
            f"{MAX_STD:,}"
        )
    return spec


def with_magnitude(text: str, magnitude: int) -> str:
    """Return a RandAugment policy in timm's syntax with another mean magnitude.

    Example:
        >>> from pipeline.augment.recipe import with_magnitude
        >>> with_magnitude("rand-m9-mstd0.5-inc1", 5)
        'rand-m5-mstd0.5-inc1'
    """
    head, *parts = text.split("-")
    others = [part for part in parts if not re.fullmatch(r"m\d+", part, re.ASCII)]
    return "-".join([head, f"m{magnitude}", *others])


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}...")


@dataclass(frozen=True, kw_only=True)
class AugmentRecipe:
    """The augmentation of training images. The defaults are the `light` recipe.

    The steps are, in this order: crop and resize, flip, RandAugment (on 8-bit pixels), normalize, random erasing, mixup
    or CutMix.

    Raises:
        UserError: a value is out of range.
    """

    size: int = 224
    """Side of the square sample in pixels, at least 1."""
    crop: Literal["random", "center"] = "random"
    """random: a random resized crop. center: the centered square with 7/8 of the short side, without randomness."""
    scale: Range = (0.08, 1.0)
    """Smallest and largest area of the random crop, as fractions of the image's area; drawn uniformly."""
    ratio: Range = (3 / 4, 4 / 3)
    """Smallest and largest aspect ratio (width / height) of the random crop; drawn log-uniformly."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    rand_augment: str | None = None
    """RandAugment policy in timm's syntax (m, n, p, mstd, inc), for instance rand-m9-mstd0.5-inc1. None: no
    RandAugment."""
    erase: float = 0.0
    """Probability of random erasing: one box, filled with normal noise after normalization."""
    mixup: float = 0.0
    """Alpha of mixup, 0 to 100: the mixing weight is drawn from Beta(alpha, alpha). 0 turns mixup off."""
    cutmix: float = 0.0
    """Alpha of CutMix, 0 to 100. 0 turns CutMix off."""
    mix_switch: float = 0.5
    """Probability of CutMix, instead of mixup, if both are on."""
    mean: Color = (0.485, 0.456, 0.406)
    """Mean of red, green and blue, 0 to 1; subtracted by the normalization."""
    std: Color = (0.229, 0.224, 0.225)
    """Standard deviation of red, green and blue, for values in 0 to 1; the normalization divides by it."""
    fill: tuple[int, int, int] = (124, 116, 104)
    """Red, green and blue (0 to 255) of the areas that geometric operations leave uncovered."""

    def __post_init__(self) -> None:
        low, high = self.scale
        _require(self.size >= 1, "size", self.size, "at least 1")
        _require(self.crop in ("random", "center"), "crop", self.crop, "'random' or 'center'")
        _require(0 < low <= high <= 1, "scale", self.scale, "0 < low <= high <= 1")
        _require(0 < self.ratio[0] <= self.ratio[1], "ratio", self.ratio, "0 < low <= high")
        for name in ("flip", "erase", "mix_switch"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "a probability")
        for name in ("mixup", "cutmix"):
            _require(0 <= getattr(self, name) <= 100, name, getattr(self, name), "0 to 100")
        _require(all(value > 0 for value in self.std), "std", self.std, "positive numbers")
        _require(all(0 <= value <= 255 for value in self.fill), "fill", self.fill, "three values from 0 to 255")
        if self.rand_augment is not None:
            parse_rand_augment(self.rand_augment)

    @property
    def policy(self) -> RandAugment | None:
        """The parsed RandAugment policy, or None without RandAugment."""
        return None if self.rand_augment is None else parse_rand_augment(self.rand_augment)

    @property
    def mixes(self) -> bool:
        """Whether rows are mixed in pairs (mixup or CutMix)."""
        return self.mixup > 0 or self.cutmix > 0


def _require(holds: bool, field: str, value: object, expected: str) -> None:
    if not holds:
        raise UserError(f"augmentation: {field} is {value}; expected {expected}")


# fat: the recipe of the FAT paper, which is DeiT's (docs/augmentation.md).
RECIPES: dict[str, AugmentRecipe] = {
    "fat": AugmentRecipe(rand_augment="rand-m9-mstd0.5-inc1", erase=0.25, mixup=0.8, cutmix=1.0),
    "light": AugmentRecipe(),
    "none": AugmentRecipe(crop="center", flip=0.0),
}


def augment_recipe(name: str, **overrides: Any) -> AugmentRecipe:
    """Return a named recipe, with some fields replaced.

    Args:
        name: `fat`: random crop, flip, RandAugment, erasing, mixup and CutMix. `light`: random crop and flip. `none`:
            center crop.
        overrides: fields of `AugmentRecipe`.

    Raises:
        UserError: the name is unknown, or a value is out of range.

    Example:
        >>> from pipeline.augment.recipe import augment_recipe
        >>> augment_recipe("fat", size=160).mixup
        0.8
    """
    if name not in RECIPES:
        raise UserError(f"augmentation {name!r}: expected one of {', '.join(RECIPES)}")
    return replace(RECIPES[name], **overrides)


def scale_and_offset(mean: Color, std: Color, pixels: int = 1) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the scale and offset that normalize 8-bit values: value * scale + offset = (value / 255 - mean) / std.

    Args:
        mean, std: per channel, for values in 0 to 1.
        pixels: number of repetitions of the three channels.

    Returns:
        scale, offset: float32 [pixels * 3].
    """
    scale, offset = 1.0 / (255.0 * np.asarray(std)), -np.asarray(mean) / np.asarray(std)
    return np.tile(scale.astype(np.float32), pixels), np.tile(offset.astype(np.float32), pixels)

"""What augmentation is asked for: one frozen recipe, and the three that have names."""

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
"""Of Beta(alpha, alpha); 0 turns mixing off."""
CropArea = Annotated[float, Interval(ge=1e-6, le=1)]
"""Area of a crop, as a share of the image's."""
MAX_LAYERS = 16  # operations an image; each is a pass over it
MAX_STD = 1000
Colour = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class RandAugment:
    """A RandAugment policy; its text form is timm's, for instance `rand-m9-mstd0.5-inc1`."""

    magnitude: int = 10
    """The mean magnitude, of 0..10 (`m`)."""
    layers: int = 2
    """Operations drawn per image, with replacement (`n`)."""
    probability: float = 0.5
    """The chance that a drawn operation is applied (`p`)."""
    std: float = 0.0
    """Standard deviation of the magnitude, which is clipped to 0..10 (`mstd`; over 100: uniform up to the mean)."""
    increasing: bool = False
    """Whether every operation grows stronger with its magnitude (`inc1`)."""


def parse_rand_augment(text: str) -> RandAugment:
    """Read timm's syntax: `rand`, then any of -mINT -nINT -pFLOAT -mstdFLOAT -inc1, in any order.

    Raises:
        UserError: the part that is not understood, named.
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
                f"RandAugment {_short(text)}: part {_short(part)} is not one of mINT nINT pFLOAT mstdFLOAT inc1"
            )
    if head != "rand":
        raise UserError(
            f"RandAugment {_short(text)}: starts with {_short(head)}, 'rand' expected, as in rand-m9-mstd0.5-inc1"
        )
    spec = RandAugment(**fields)
    if spec.magnitude > 10 or spec.probability > 1 or spec.layers > MAX_LAYERS or spec.std > MAX_STD:
        raise UserError(
            f"RandAugment {_short(text)}: m up to 10, n up to {MAX_LAYERS}, p up to 1 and mstd up to {MAX_STD:,} "
            "expected"
        )
    return spec


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}...")


@dataclass(frozen=True, kw_only=True)
class AugmentRecipe:
    """How a training image becomes a sample. Without arguments: the `light` recipe."""

    size: int = 224
    """Side of the square sample, in pixels."""
    crop: Literal["random", "centre"] = "random"
    """random: a random resized crop. centre: the centred square of 7/8 of the short side, without randomness."""
    scale: Range = (0.08, 1.0)
    """Area of the random crop, as a share of the image's: drawn uniformly."""
    ratio: Range = (3 / 4, 4 / 3)
    """Width over height of the random crop: drawn log-uniformly."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    rand_augment: str | None = None
    """RandAugment policy in timm's syntax (m, n, p, mstd, inc), for instance rand-m9-mstd0.5-inc1."""
    erase: float = 0.0
    """Probability of random erasing: one box, filled with normal noise after normalisation."""
    mixup: float = 0.0
    """Mixup's alpha: the mixing share is drawn from Beta(alpha, alpha). 0 turns mixup off."""
    cutmix: float = 0.0
    """CutMix's alpha. 0 turns CutMix off."""
    mix_switch: float = 0.5
    """Probability of CutMix rather than mixup where both are on."""
    mean: Colour = (0.485, 0.456, 0.406)
    """Mean of red, green and blue in 0..1, subtracted from every sample."""
    std: Colour = (0.229, 0.224, 0.225)
    """Standard deviation of red, green and blue in 0..1, divided out."""
    fill: tuple[int, int, int] = (124, 116, 104)
    """Colour of the corners that geometric operations lay bare, 0..255."""

    def __post_init__(self) -> None:
        low, high = self.scale
        _require(self.size >= 1, "size", self.size, "at least 1")
        _require(self.crop in ("random", "centre"), "crop", self.crop, "'random' or 'centre'")
        _require(0 < low <= high <= 1, "scale", self.scale, "0 < low <= high <= 1")
        _require(0 < self.ratio[0] <= self.ratio[1], "ratio", self.ratio, "0 < low <= high")
        for name in ("flip", "erase", "mix_switch"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "a probability")
        for name in ("mixup", "cutmix"):
            _require(0 <= getattr(self, name) <= 100, name, getattr(self, name), "0 to 100")
        _require(all(value > 0 for value in self.std), "std", self.std, "positive numbers")
        _require(all(0 <= value <= 255 for value in self.fill), "fill", self.fill, "three values of 0..255")
        if self.rand_augment is not None:
            parse_rand_augment(self.rand_augment)

    @property
    def policy(self) -> RandAugment | None:
        """The RandAugment policy, read; None where there is none."""
        return None if self.rand_augment is None else parse_rand_augment(self.rand_augment)

    @property
    def mixes(self) -> bool:
        """Whether samples are mixed in pairs."""
        return self.mixup > 0 or self.cutmix > 0


def _require(holds: bool, field: str, value: object, expected: str) -> None:
    if not holds:
        raise UserError(f"augmentation: {field} is {value}; {expected} expected")


# The FAT paper's recipe is DeiT's: see docs/augmentation.md.
RECIPES: dict[str, AugmentRecipe] = {
    "fat": AugmentRecipe(rand_augment="rand-m9-mstd0.5-inc1", erase=0.25, mixup=0.8, cutmix=1.0),
    "light": AugmentRecipe(),
    "none": AugmentRecipe(crop="centre", flip=0.0),
}


def augment_recipe(name: str, **overrides: Any) -> AugmentRecipe:
    """The recipe of this name (`fat`, `light` or `none`), with some fields replaced: `augment_recipe("fat", size=160)`.

    Raises:
        UserError: no such recipe, or a value out of range.
    """
    if name not in RECIPES:
        raise UserError(f"augmentation {name!r}: one of {', '.join(RECIPES)} expected")
    return replace(RECIPES[name], **overrides)


def scale_and_offset(mean: Colour, std: Colour, pixels: int = 1) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What turns bytes into normalised numbers: value * scale + offset = (value / 255 - mean) / std.

    Args:
        mean, std: per channel, on the 0..1 scale.
        pixels: for how many pixels, one after the other.

    Returns:
        scale, offset: float32 [pixels * 3].
    """
    scale, offset = 1.0 / (255.0 * np.asarray(std)), -np.asarray(mean) / np.asarray(std)
    return np.tile(scale.astype(np.float32), pixels), np.tile(offset.astype(np.float32), pixels)

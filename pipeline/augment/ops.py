"""RandAugment's fifteen operations: their names, and what a magnitude means to each."""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

MAX_MAGNITUDE = 10.0


class Op(IntEnum):
    """The operations, in timm's order. Never renumber: the numbers are drawn."""

    AUTO_CONTRAST = 0
    EQUALIZE = 1
    INVERT = 2
    ROTATE = 3
    POSTERIZE = 4
    SOLARIZE = 5
    SOLARIZE_ADD = 6
    COLOR = 7
    CONTRAST = 8
    BRIGHTNESS = 9
    SHARPNESS = 10
    SHEAR_X = 11
    SHEAR_Y = 12
    TRANSLATE_X = 13
    TRANSLATE_Y = 14

    @property
    def title(self) -> str:
        """As in `AutoContrast`."""
        return self.name.title().replace("_", "")


OPS = tuple(Op)


def arguments(
    ops: NDArray[np.int64], magnitudes: NDArray[np.float64], signs: NDArray[np.float64], *, increasing: bool
) -> NDArray[np.float64]:
    """What each operation is called with, float64 of the common shape.

    Degrees counter-clockwise for Rotate; bits kept for Posterize; threshold for Solarize; summand for SolarizeAdd;
    blending factor for Color, Contrast, Brightness and Sharpness; shift per pixel for shears; share of the side for
    translations; 0 for the others.

    Args:
        ops: values of `Op`.
        magnitudes: in 0..10.
        signs: -1 or 1; which operations heed it depends on `increasing`.
        increasing: timm's `inc1`: the harder, the higher the magnitude. Otherwise Posterize and Solarize soften with
            it, and the factors run from .1 to 1.9 without a sign.
    """
    share = magnitudes / MAX_MAGNITUDE
    bits, threshold = np.trunc(share * 4.0), np.minimum(np.trunc(share * 256.0), 256.0)
    if increasing:
        bits, threshold = 4.0 - bits, 256.0 - threshold
        factor = np.maximum(0.1, 1.0 + signs * (share * 0.9))
    else:
        factor = share * 1.8 + 0.1
    table = {
        Op.ROTATE: signs * (share * 30.0),
        Op.POSTERIZE: bits,
        Op.SOLARIZE: threshold,
        Op.SOLARIZE_ADD: np.minimum(np.trunc(share * 110.0), 128.0),
        Op.COLOR: factor,
        Op.CONTRAST: factor,
        Op.BRIGHTNESS: factor,
        Op.SHARPNESS: factor,
        Op.SHEAR_X: signs * (share * 0.3),
        Op.SHEAR_Y: signs * (share * 0.3),
        Op.TRANSLATE_X: signs * (share * 0.45),
        Op.TRANSLATE_Y: signs * (share * 0.45),
    }
    return np.select([ops == op for op in table], list(table.values()), default=0.0)


_CAPTIONS = {
    Op.ROTATE: "{:+.1f}°",
    Op.POSTERIZE: "{:.0f}-bit",
    Op.SOLARIZE: "from {:.0f}",
    Op.SOLARIZE_ADD: "{:+.0f}",
    Op.COLOR: "x{:.2f}",
    Op.CONTRAST: "x{:.2f}",
    Op.BRIGHTNESS: "x{:.2f}",
    Op.SHARPNESS: "x{:.2f}",
    Op.SHEAR_X: "{:+.2f}",
    Op.SHEAR_Y: "{:+.2f}",
    Op.TRANSLATE_X: "{:+.0%}",
    Op.TRANSLATE_Y: "{:+.0%}",
}


def caption(op: Op, argument: float) -> str:
    """For people, as in `Rotate -26.4°`."""
    return f"{op.title} {_CAPTIONS.get(op, '')}".rstrip().format(argument)

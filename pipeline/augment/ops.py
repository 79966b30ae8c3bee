"""The fifteen operations of RandAugment: their names, and the conversion of magnitudes to arguments."""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

MAX_MAGNITUDE = 10.0


class Op(IntEnum):
    """The operations, in timm's order. Never renumber: operations are drawn as numbers."""

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
        """The name as timm spells it, such as `AutoContrast`."""
        return self.name.title().replace("_", "")


OPS = tuple(Op)


def arguments(
    ops: NDArray[np.int64], magnitudes: NDArray[np.float64], signs: NDArray[np.float64], *, increasing: bool
) -> NDArray[np.float64]:
    """Convert magnitudes to the arguments of the operations.

    The argument is the angle in degrees, counter-clockwise (Rotate), the number of bits that are kept (Posterize), the
    threshold (Solarize), the added value (SolarizeAdd), the blending factor (Color, Contrast, Brightness, Sharpness),
    the shift per pixel (shears) or the fraction of the image's side (translations). It is 0 for the other operations.

    Args:
        ops: values of `Op`.
        magnitudes: 0 to 10.
        signs: -1 or 1, used by Rotate, the shears and the translations, and by the factors if `increasing`.
        increasing: timm's `inc1`: every operation becomes stronger with its magnitude. If False, Posterize and Solarize
            become weaker with it, and the factors range from 0.1 to 1.9.

    Returns:
        float64 arguments, of the shape to which the inputs broadcast.
    """
    level = magnitudes / MAX_MAGNITUDE
    bits, threshold = np.trunc(level * 4.0), np.minimum(np.trunc(level * 256.0), 256.0)
    if increasing:
        bits, threshold = 4.0 - bits, 256.0 - threshold
        factor = np.maximum(0.1, 1.0 + signs * (level * 0.9))
    else:
        factor = level * 1.8 + 0.1
    table = {
        Op.ROTATE: signs * (level * 30.0),
        Op.POSTERIZE: bits,
        Op.SOLARIZE: threshold,
        Op.SOLARIZE_ADD: np.minimum(np.trunc(level * 110.0), 128.0),
        Op.COLOR: factor,
        Op.CONTRAST: factor,
        Op.BRIGHTNESS: factor,
        Op.SHARPNESS: factor,
        Op.SHEAR_X: signs * (level * 0.3),
        Op.SHEAR_Y: signs * (level * 0.3),
        Op.TRANSLATE_X: signs * (level * 0.45),
        Op.TRANSLATE_Y: signs * (level * 0.45),
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
    """Return the operation and its argument as text, such as `Rotate -26.4°`."""
    return f"{op.title} {_CAPTIONS.get(op, '')}".rstrip().format(argument)

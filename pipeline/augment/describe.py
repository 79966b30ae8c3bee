"""A sample's augmentation in words."""

from __future__ import annotations

from pipeline.augment.ops import Op, caption
from pipeline.augment.params import SampleParams


def describe(params: SampleParams, i: int) -> str:
    """What happens to sample `i`, as in `flip, Rotate -26.4°, Solarize from 25, erase 40x52`; else `plain`.

    The crop, which every sample gets, is left out; sides are height x width.
    """
    parts = ["flip"] if params.flips[i] else []
    parts += [
        caption(Op(op), argument)
        for op, argument, applied in zip(params.ops[i], params.arguments[i], params.applied[i], strict=True)
        if applied
    ]
    _, _, height, width = params.erase_boxes[i]
    if height:
        parts.append(f"erase {height}x{width}")
    return ", ".join(parts) or "plain"

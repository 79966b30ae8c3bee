"""Describe the augmentation of a sample in words."""

from __future__ import annotations

from pipeline.augment.ops import Op, caption
from pipeline.augment.params import SampleParams


def describe(params: SampleParams, i: int) -> str:
    """Return the operations on sample `i`, such as `flip, Rotate -26.4°, Solarize from 25, erase 40x52`.

    The crop is not listed, because every sample has one. The erased box is given as height x width. Without any
    operation, the text is `plain`.
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

"""Finish a batch in one pass: normalize, erase and mix, compiled by Numba.

The PyTorch modules `erase` and `mix` define the operations. The values are the same; only those of mixup differ by
rounding, because PyTorch uses fused multiply-add. Both rows of a pair are read once, as bytes.
"""

from __future__ import annotations

import numpy as np

from pipeline import rng
from pipeline.augment.numba_impl.compiler import cached, compiled

F, U = np.float32, np.uint64
GOLDEN, MIX1, MIX2 = rng.GOLDEN, rng.MIX1, rng.MIX2


@cached
def finish(images, scale, offset, erase_boxes, erase_keys, quantiles, mixes, lam, use_cutmix, mix_boxes, out):
    """Finish n samples.

    Args:
        images: uint8 [n, height * width * 3].
        scale, offset: float32 [width * 3].
        erase_boxes, erase_keys: int32 [n, 4] and uint64 [n] (`SampleParams`).
        quantiles: quantiles of the standard normal, float32 [65536].
        mixes: whether rows 2i and 2i + 1 are mixed.
        lam, use_cutmix, mix_boxes: float32 [n], bool [n] and int32 [n, 4] (`MixParams`).
        out: float32, like `images`.
    """
    values = len(scale)
    pair = np.empty((2, values), np.float32)
    for row in range(0, len(images), 2 if mixes else 1):
        for y in range(images.shape[1] // values):
            line = slice(y * values, (y + 1) * values)
            if not mixes:
                _normalize(images[row, line], scale, offset, out[row, line])
                _erase(erase_boxes[row], erase_keys[row], quantiles, y, out[row, line])
                continue
            for side in range(2):
                _normalize(images[row + side, line], scale, offset, pair[side])
                _erase(erase_boxes[row + side], erase_keys[row + side], quantiles, y, pair[side])
            for side in range(2):
                i, own, partner = row + side, pair[side], pair[1 - side]
                if use_cutmix[i]:
                    _cut(own, partner, mix_boxes[i], y, out[i, line])
                else:
                    _blend(own, partner, lam[i], out[i, line])


@compiled
def _normalize(pixels, scale, offset, out):
    for i in range(len(pixels)):
        out[i] = F(pixels[i]) * scale[i] + offset[i]


@compiled
def _erase(box, key, quantiles, y, out):
    """Fill the part of the box that is in row y with noise, a hash of the key and the pixel's index in the box."""
    top, left, high, wide = box[0], box[1], box[2], box[3]
    if not top <= y < top + high:
        return
    first = (y - top) * wide
    for x in range(wide):
        state = (key ^ U(first + x)) + GOLDEN
        state = (state ^ (state >> U(30))) * MIX1
        state = (state ^ (state >> U(27))) * MIX2
        state ^= state >> U(31)
        for channel in range(3):
            out[3 * (left + x) + channel] = quantiles[(state >> U(16 * channel)) & U(0xFFFF)]


@compiled
def _cut(own, partner, box, y, out):
    top, left, high, wide = box[0], box[1], box[2], box[3]
    for i in range(len(own)):
        out[i] = own[i]
    if top <= y < top + high:
        for i in range(3 * left, 3 * (left + wide)):
            out[i] = partner[i]


@compiled
def _blend(own, partner, weight, out):
    for i in range(len(own)):
        out[i] = own[i] * weight + partner[i] * (F(1) - weight)

"""Shrink pixels with antialiasing."""

from __future__ import annotations

import numpy as np
from PIL import Image

from shards.images.pixels import BAND_PIXELS, Pixels
from shards.images.rules import ImageRules

_FILTERS = {"hamming": Image.Resampling.HAMMING, "bicubic": Image.Resampling.BICUBIC}


def target_size(width: int, height: int, rules: ImageRules) -> tuple[int, int] | None:
    """Return the width and height after shrinking; None if the image is not shrunk."""
    scale = 1.0
    if rules.max_side is not None:
        scale = min(scale, rules.max_side / max(width, height))
    if rules.short_side is not None:
        scale = min(scale, rules.short_side / min(width, height))
    if scale == 1.0:
        return None
    return max(1, round(width * scale)), max(1, round(height * scale))


def shrink(pixels: Pixels, target: tuple[int, int], rules: ImageRules) -> Pixels:
    """Resize uint8 [H, W, 1 or 3] to the (width, height) of `target`, with the filter of `rules`.

    Pillow resizes along rows, rounds to integers, and then resizes along columns. Resizing a large image in bands
    therefore gives the same pixels and needs fewer copies.
    """
    resample = _FILTERS[rules.filter]
    (height, width, channels), (new_width, new_height) = pixels.shape, target
    if height * width <= BAND_PIXELS:
        return _resize(pixels, target, resample)
    narrow = np.empty((height, new_width, channels), np.uint8)
    rows = max(1, BAND_PIXELS // width)
    for top in range(0, height, rows):
        band = pixels[top : top + rows]
        narrow[top : top + rows] = _resize(band, (new_width, len(band)), resample)
    shrunk = np.empty((new_height, new_width, channels), np.uint8)
    columns = max(1, BAND_PIXELS // height)
    for left in range(0, new_width, columns):
        strip = np.ascontiguousarray(narrow[:, left : left + columns])
        shrunk[:, left : left + columns] = _resize(strip, (strip.shape[1], new_height), resample)
    return shrunk


def _resize(pixels: Pixels, target: tuple[int, int], resample: Image.Resampling) -> Pixels:
    gray = pixels.shape[2] == 1
    resized = np.asarray(Image.fromarray(pixels[:, :, 0] if gray else pixels).resize(target, resample))
    return resized[:, :, None] if gray else resized

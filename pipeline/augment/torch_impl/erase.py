"""Random erasing: boxes of normal noise in the normalised batch, each value a function of its key and place."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline import rng
from pipeline.augment.params import SampleParams
from pipeline.augment.transfer import upload

QUANTILES = 1 << 16


class Eraser:
    """Writes the noise. It holds the normal's 65,536 quantiles: a table look-up gives the same value everywhere, where
    a logarithm or cosine would differ between machines in its last bits."""

    def __init__(self, device: torch.device) -> None:
        (self.quantiles,) = upload([quantiles()], device)

    def __call__(self, images: Tensor, params: SampleParams) -> None:
        """Overwrite the boxes in place; images: floating [B, 3, H, W], channels-last."""
        drawn = np.flatnonzero(params.erase_boxes[:, 2])
        if not len(drawn):
            return
        tops, lefts, heights, widths = params.erase_boxes[drawn].astype(np.int64).T
        areas = heights * widths
        boxes = np.stack([drawn, tops, lefts, widths, np.cumsum(areas) - areas])
        box, area, key = upload([boxes, areas, params.erase_keys[drawn]], images.device)
        # One entry per erased pixel: its sample and its place in the box, row by row. The host knows how many, so that
        # the device need not be asked.
        pixels = int(areas.sum())
        sample, y, x, width, start = box.repeat_interleave(area, dim=1, output_size=pixels)
        place = torch.arange(pixels, device=images.device) - start
        noise = self._noise(key.repeat_interleave(area, output_size=pixels), place)
        batch, _, high, wide = images.shape
        down = torch.div(place, width, rounding_mode="floor")
        target = (sample * high + y + down) * wide + x + place - down * width
        images.permute(0, 2, 3, 1).view(batch * high * wide, 3).index_copy_(0, target, noise.to(images.dtype))

    def _noise(self, keys: Tensor, place: Tensor) -> Tensor:
        """Standard normal float32 [pixels, 3], each from 16 bits of the hash; keys and place: int64 [pixels]."""
        bits = hash_pixel(keys, place)
        words = torch.stack([bits, bits >> 16, bits >> 32], dim=1) & (QUANTILES - 1)
        return self.quantiles.index_select(0, words.view(-1)).view(-1, 3)


def quantiles() -> NDArray[np.float32]:
    """The standard normal's quantiles at the middles of 65,536 equal steps, float32."""
    return rng.normal_quantile((np.arange(QUANTILES) + 0.5) / QUANTILES).astype(np.float32)


def hash_pixel(keys: Tensor, place: Tensor) -> Tensor:
    """`rng.extend(keys, place)` on the device: int64, the same 64 bits."""
    state = (keys ^ place) + _signed(rng.GOLDEN)
    state = (state ^ _shift(state, 30)) * _signed(rng.MIX1)
    state = (state ^ _shift(state, 27)) * _signed(rng.MIX2)
    return state ^ _shift(state, 31)


def _signed(word: np.uint64) -> int:
    return int(word.astype(np.int64))


def _shift(state: Tensor, by: int) -> Tensor:
    """A right shift that brings in zeros: torch has signed integers only."""
    return (state >> by) & ((1 << (64 - by)) - 1)

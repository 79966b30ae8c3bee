"""Random erasing: fill boxes of the normalized batch with normal noise, a hash of the sample's key and the pixel."""

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
    """Writes the noise of random erasing.

    The noise is looked up in a table of 65,536 quantiles of the standard normal, which gives the same values on every
    device; the last bits of a logarithm or cosine would differ between devices.
    """

    def __init__(self, device: torch.device) -> None:
        (self.quantiles,) = upload([quantiles()], device)

    def __call__(self, images: Tensor, params: SampleParams) -> None:
        """Fill the boxes in place; images: floating-point [B, 3, H, W], channels-last."""
        erased = np.flatnonzero(params.erase_boxes[:, 2])
        if not len(erased):
            return
        tops, lefts, heights, widths = params.erase_boxes[erased].astype(np.int64).T
        areas = heights * widths
        boxes = np.stack([erased, tops, lefts, widths, np.cumsum(areas) - areas])
        box, area, key = upload([boxes, areas, params.erase_keys[erased]], images.device)
        # One entry per erased pixel: its sample and its index in the box, row by row. The number of pixels is computed
        # on the host, to avoid waiting for the device.
        pixels = int(areas.sum())
        sample, y, x, width, start = box.repeat_interleave(area, dim=1, output_size=pixels)
        pixel = torch.arange(pixels, device=images.device) - start
        noise = self._noise(key.repeat_interleave(area, output_size=pixels), pixel)
        batch, _, high, wide = images.shape
        down = torch.div(pixel, width, rounding_mode="floor")
        target = (sample * high + y + down) * wide + x + pixel - down * width
        images.permute(0, 2, 3, 1).view(batch * high * wide, 3).index_copy_(0, target, noise.to(images.dtype))

    def _noise(self, keys: Tensor, pixel: Tensor) -> Tensor:
        """Return standard normal float32 [pixels, 3], each value from 16 bits of the hash.

        Args:
            keys: int64 [pixels]: key of the pixel's sample.
            pixel: int64 [pixels]: index of the pixel in its box.
        """
        bits = hash_pixel(keys, pixel)
        words = torch.stack([bits, bits >> 16, bits >> 32], dim=1) & (QUANTILES - 1)
        return self.quantiles.index_select(0, words.view(-1)).view(-1, 3)


def quantiles() -> NDArray[np.float32]:
    """Return the quantiles of the standard normal at the midpoints of 65,536 equal intervals, float32 [65536]."""
    return rng.normal_quantile((np.arange(QUANTILES) + 0.5) / QUANTILES).astype(np.float32)


def hash_pixel(keys: Tensor, pixel: Tensor) -> Tensor:
    """Compute `rng.extend(keys, pixel)` on the device: int64 with the same 64 bits."""
    state = (keys ^ pixel) + _signed(rng.GOLDEN)
    state = (state ^ _shift(state, 30)) * _signed(rng.MIX1)
    state = (state ^ _shift(state, 27)) * _signed(rng.MIX2)
    return state ^ _shift(state, 31)


def _signed(word: np.uint64) -> int:
    return int(word.astype(np.int64))


def _shift(state: Tensor, by: int) -> Tensor:
    """Shift right and fill with zeros (a logical shift), because PyTorch's shift of int64 is arithmetic."""
    return (state >> by) & ((1 << (64 - by)) - 1)

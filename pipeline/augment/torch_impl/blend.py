"""Color and Sharpness: blends of an image with a degenerate one, bit for bit as PIL's ImageEnhance has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.augment.torch_impl.blocks import by_block
from pipeline.augment.torch_impl.tables import luma

# PIL's SMOOTH: the mean of 3 x 3 pixels, the middle one five times.
MIDDLE, WEIGHTS = 5, 13


def prepare(ops: NDArray[np.int64], arguments: NDArray[np.float64], size: int) -> list[NDArray[Any]]:
    """The factors, float32 [n]."""
    return [arguments.astype(np.float32)]


def colour(images: Tensor, tensors: Sequence[Tensor], fill: tuple[int, int, int]) -> Tensor:
    """Towards grey below factor 1, away from it above. images: uint8 [n, H, W, 3]; the same is returned."""
    return by_block(_colour, images, *tensors)


def sharpness(images: Tensor, tensors: Sequence[Tensor], fill: tuple[int, int, int]) -> Tensor:
    """Towards a smoothed image below factor 1, away from it above; the border of one pixel stays as it is."""
    return by_block(_sharpness, images, *tensors)


def _colour(images: Tensor, factors: Tensor) -> Tensor:
    grey = luma(images).to(torch.float32)[..., None].expand(images.shape)
    return _blend(grey.contiguous(), images, factors)


def _sharpness(images: Tensor, factors: Tensor) -> Tensor:
    smooth = images.to(torch.float32)
    if min(images.shape[1:3]) > 2:
        # Sums fit 16 bits; thirteenths never tie.
        wide = images.to(torch.int16)
        tall = wide[:, :-2] + wide[:, 1:-1] + wide[:, 2:]
        total = tall[:, :, :-2] + tall[:, :, 1:-1] + tall[:, :, 2:] + (MIDDLE - 1) * wide[:, 1:-1, 1:-1]
        smooth[:, 1:-1, 1:-1] = total.to(torch.float32).add_(WEIGHTS / 2).mul_(1 / WEIGHTS).floor_()
    return _blend(smooth, images, factors)


def _blend(degenerate: Tensor, images: Tensor, factors: Tensor) -> Tensor:
    """degenerate + factor (image - degenerate), clipped and truncated; degenerate is float32 and of integers."""
    difference = images.to(torch.float32).sub_(degenerate)
    return difference.mul_(factors[:, None, None, None]).add_(degenerate).clamp_(0, 255).to(torch.uint8)

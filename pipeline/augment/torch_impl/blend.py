"""Color and Sharpness: blend an image with a degenerate image, with exactly the bytes of PIL's ImageEnhance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.augment.torch_impl.blocks import by_block
from pipeline.augment.torch_impl.tables import luma

# PIL's SMOOTH filter: the mean of 3 x 3 pixels, in which the middle pixel has weight 5 and the total weight is 13.
MIDDLE, WEIGHTS = 5, 13


def prepare(ops: NDArray[np.int64], arguments: NDArray[np.float64], size: int) -> list[NDArray[Any]]:
    """Return the blending factors, float32 [n]."""
    return [arguments.astype(np.float32)]


def color(images: Tensor, tensors: Sequence[Tensor], fill: tuple[int, int, int]) -> Tensor:
    """Blend with the gray image: less color below factor 1, more above. uint8 [n, H, W, 3] -> uint8 [n, H, W, 3]."""
    return by_block(_color, images, *tensors)


def sharpness(images: Tensor, tensors: Sequence[Tensor], fill: tuple[int, int, int]) -> Tensor:
    """Blend with a smoothed image: smoother below factor 1, sharper above. Border pixels are unchanged.

    uint8 [n, H, W, 3] -> uint8 [n, H, W, 3].
    """
    return by_block(_sharpness, images, *tensors)


def _color(images: Tensor, factors: Tensor) -> Tensor:
    gray = luma(images).to(torch.float32)[..., None].expand(images.shape)
    return _blend(gray.contiguous(), images, factors)


def _sharpness(images: Tensor, factors: Tensor) -> Tensor:
    smooth = images.to(torch.float32)
    if min(images.shape[1:3]) > 2:
        # The sums fit into 16 bits, and a multiple of 1/13 is never halfway between two integers.
        wide = images.to(torch.int16)
        tall = wide[:, :-2] + wide[:, 1:-1] + wide[:, 2:]
        total = tall[:, :, :-2] + tall[:, :, 1:-1] + tall[:, :, 2:] + (MIDDLE - 1) * wide[:, 1:-1, 1:-1]
        smooth[:, 1:-1, 1:-1] = total.to(torch.float32).add_(WEIGHTS / 2).mul_(1 / WEIGHTS).floor_()
    return _blend(smooth, images, factors)


def _blend(degenerate: Tensor, images: Tensor, factors: Tensor) -> Tensor:
    """Compute degenerate + factor * (image - degenerate), clipped to 0 to 255 and truncated to uint8.

    `degenerate` is float32 with integral values.
    """
    difference = images.to(torch.float32).sub_(degenerate)
    return difference.mul_(factors[:, None, None, None]).add_(degenerate).clamp_(0, 255).to(torch.uint8)

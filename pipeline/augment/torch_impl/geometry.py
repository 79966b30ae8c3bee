"""Rotate, shears and translations, resampled with exactly the bytes of PIL's Image.transform.

The bicubic kernel of PIL's transform has a = -1 (PIL's resize has -0.5, PyTorch's grid_sample -0.75). It clamps the 4 x
4 neighbors to the image, truncates to 8 bits, and fills pixels whose sampling center is outside the image. Shears and
translations sample on whole rows or columns, so 4 of the 16 neighbors suffice.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from sys import byteorder
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from pipeline.augment.ops import Op
from pipeline.augment.torch_impl.blocks import by_block


def prepare(ops: NDArray[np.int64], arguments: NDArray[np.float64], size: int) -> list[NDArray[Any]]:
    """Return the affine maps from output to source pixels, float64 [n, 6]: x' = ax + by + c, y' = dx + ey + f."""
    return [matrices(ops, arguments, size, size)]


def matrices(ops: NDArray[np.int64], arguments: NDArray[np.float64], height: int, width: int) -> NDArray[np.float64]:
    """Return the coefficients (a, b, c, d, e, f) of PIL's Image.transform, float64 [n, 6].

    Shears have the image's corner as fixed point, rotations the center. Other operations get the identity.
    """
    result = np.tile([1.0, 0.0, 0.0, 0.0, 1.0, 0.0], (len(ops), 1))
    for op, column, unit in (
        (Op.SHEAR_X, 1, 1.0),
        (Op.SHEAR_Y, 3, 1.0),
        (Op.TRANSLATE_X, 2, width),
        (Op.TRANSLATE_Y, 5, height),
    ):
        result[ops == op, column] = arguments[ops == op] * unit
    rotated = ops == Op.ROTATE
    # PIL rounds to 15 decimals. This also removes the last bits, in which sine and cosine differ between libraries.
    angle = -np.radians(arguments[rotated])
    cos, sin = np.round(np.cos(angle), 15), np.round(np.sin(angle), 15)
    x, y = width / 2, height / 2
    rotation = [cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y]
    result[rotated] = np.stack(rotation, axis=1)
    return result


def rotate(images: Tensor, tensors: Sequence[Tensor], fill: tuple[int, int, int]) -> Tensor:
    """Resample by any affine map. uint8 [n, H, W, 3], contiguous -> uint8 [n, H, W, 3]."""
    return by_block(partial(_resample, fill=fill, taps_x=4, taps_y=4), images, *tensors)


def along_x(images: Tensor, tensors: Sequence[Tensor], fill: tuple[int, int, int]) -> Tensor:
    """Resample by maps that do not change y (Shear and Translate along x)."""
    return by_block(partial(_resample, fill=fill, taps_x=4, taps_y=1), images, *tensors)


def along_y(images: Tensor, tensors: Sequence[Tensor], fill: tuple[int, int, int]) -> Tensor:
    """Resample by maps that do not change x (Shear and Translate along y)."""
    return by_block(partial(_resample, fill=fill, taps_x=1, taps_y=4), images, *tensors)


def _resample(images: Tensor, maps: Tensor, *, fill: tuple[int, int, int], taps_x: int, taps_y: int) -> Tensor:
    count, height, width, _ = images.shape
    device = images.device
    a, b, c, d, e, f = maps.view(count, 6, 1, 1).unbind(1)
    # float64 like PIL, so that pixels on the edge are classified as inside or outside in the same way.
    x = torch.arange(width, dtype=torch.float64, device=device) + 0.5
    y = torch.arange(height, dtype=torch.float64, device=device)[:, None] + 0.5
    first = torch.arange(0, count * height, height, dtype=torch.int32, device=device).view(count, 1, 1)
    columns, rows = x.to(torch.int32), y.to(torch.int32) + first  # truncation removes the 0.5 of pixel centers
    inside = torch.ones_like(maps[:, :1, None], dtype=torch.bool)
    if taps_x == 4:
        inside, columns, fraction_x = _neighbors(a * x + b * y + c, width)
    if taps_y == 4:
        inside_y, rows, fraction_y = _neighbors(d * x + e * y + f, height)
        inside, rows = inside & inside_y, rows + first
    pixels = (rows * width).view(taps_y, 1, *rows.shape[-3:]) + columns
    # Pad to four bytes per pixel, so that one gather of 32-bit words reads all channels.
    packed = pad(images, (0, 1)).view(torch.int32).view(-1)
    values = packed.index_select(0, pixels.view(-1)).view(torch.uint8).view(taps_y, taps_x, -1, 4).to(torch.float32)
    values = _cubic(values.unbind(1), fraction_x) if taps_x == 4 else values[:, 0]
    values = _cubic(values.unbind(0), fraction_y) if taps_y == 4 else values[0]
    sampled = values.clamp_(0, 255).to(torch.uint8).view(torch.int32).view(count, height, width)
    color = int.from_bytes(bytes((*fill, 0)), byteorder, signed=True)
    return torch.where(inside, sampled, color).view(torch.uint8).view(count, height, width, 4)[..., :3]


def _neighbors(source: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Find the four neighbors of coordinates along one axis.

    Args:
        source: float64 [n, H, W]: coordinates in the source, in pixels.
        size: side of the image along this axis.

    Returns:
        Whether each coordinate is inside the image, bool [n, H, W]; the indices of its four neighbors, clamped to the
        image, int32 [4, n, H, W]; its distance from the second neighbor, 0 to 1, float32 [n * H * W, 4], the same in
        each channel.
    """
    inside = (source >= 0) & (source < size)
    centered = source - 0.5
    before = centered.floor()
    fraction = (centered - before).to(torch.float32).view(-1, 1).expand(-1, 4).contiguous()
    offsets = torch.arange(-1, 3, dtype=torch.int32, device=source.device).view(4, 1, 1, 1)
    return inside, (before.to(torch.int32) + offsets).clamp_(0, size - 1), fraction


def _cubic(values: Sequence[Tensor], t: Tensor) -> Tensor:
    """Interpolate between four neighbors, float32 [..., pixels, 4] (overwritten), at t [pixels, 4], like PIL.

    The value is v2 + t ((v3 - v1) + t ((2 (v1 - v2) + v3 - v4) - t (v1 - v2 + v3 - v4))), in PIL's order of operations.
    """
    v1, v2, v3, v4 = values
    slope = v3 - v1
    first, last = v1.sub_(v2), v3.sub_(v4)
    bend = last.add_(first)
    square = first.add_(bend)
    return square.sub_(bend.mul_(t)).mul_(t).add_(slope).mul_(t).add_(v2)

"""Rotate, shears and translations, resampled as PIL's Image.transform does it.

PIL's bicubic transform kernel has a = -1 (its resize has -.5, torch's grid_sample -.75), clamps its 4 x 4 neighbours to
the image, truncates to 8 bits, and fills where the centre of sampling leaves the image. Shears and translations sample
on whole rows or columns, where the kernel needs 4 neighbours of the 16.
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
    """Maps from output to source, float64 [n, 6]: x' = ax + by + c, y' = dx + ey + f."""
    return [matrices(ops, arguments, size, size)]


def matrices(ops: NDArray[np.int64], arguments: NDArray[np.float64], height: int, width: int) -> NDArray[np.float64]:
    """PIL's coefficients (a, b, c, d, e, f), float64 [n, 6]: shears pivot on the corner, rotations on the centre."""
    result = np.tile([1.0, 0.0, 0.0, 0.0, 1.0, 0.0], (len(ops), 1))
    for op, column, unit in (
        (Op.SHEAR_X, 1, 1.0),
        (Op.SHEAR_Y, 3, 1.0),
        (Op.TRANSLATE_X, 2, width),
        (Op.TRANSLATE_Y, 5, height),
    ):
        result[ops == op, column] = arguments[ops == op] * unit
    turned = ops == Op.ROTATE
    # PIL rounds to 15 decimals too; that also hides the last bits in which libraries' sine and cosine differ.
    angle = -np.radians(arguments[turned])
    cos, sin = np.round(np.cos(angle), 15), np.round(np.sin(angle), 15)
    x, y = width / 2, height / 2
    rotation = [cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y]
    result[turned] = np.stack(rotation, axis=1)
    return result


def rotate(images: Tensor, tensors: Sequence[Tensor], fill: tuple[int, int, int]) -> Tensor:
    """Any affine map. images: uint8 [n, H, W, 3], contiguous; the same is returned."""
    return by_block(partial(_resample, fill=fill, taps_x=4, taps_y=4), images, *tensors)


def along_x(images: Tensor, tensors: Sequence[Tensor], fill: tuple[int, int, int]) -> Tensor:
    """Maps that keep y."""
    return by_block(partial(_resample, fill=fill, taps_x=4, taps_y=1), images, *tensors)


def along_y(images: Tensor, tensors: Sequence[Tensor], fill: tuple[int, int, int]) -> Tensor:
    """Maps that keep x."""
    return by_block(partial(_resample, fill=fill, taps_x=1, taps_y=4), images, *tensors)


def _resample(images: Tensor, maps: Tensor, *, fill: tuple[int, int, int], taps_x: int, taps_y: int) -> Tensor:
    count, height, width, _ = images.shape
    device = images.device
    a, b, c, d, e, f = maps.view(count, 6, 1, 1).unbind(1)
    # Coordinates in float64, as PIL has them: a pixel on the edge falls on the same side.
    x = torch.arange(width, dtype=torch.float64, device=device) + 0.5
    y = torch.arange(height, dtype=torch.float64, device=device)[:, None] + 0.5
    first = torch.arange(0, count * height, height, dtype=torch.int32, device=device).view(count, 1, 1)
    columns, rows = x.to(torch.int32), y.to(torch.int32) + first  # truncated: without the half
    inside = torch.ones_like(maps[:, :1, None], dtype=torch.bool)
    if taps_x == 4:
        inside, columns, share_x = _neighbours(a * x + b * y + c, width)
    if taps_y == 4:
        inside_y, rows, share_y = _neighbours(d * x + e * y + f, height)
        inside, rows = inside & inside_y, rows + first
    places = (rows * width).view(taps_y, 1, *rows.shape[-3:]) + columns
    # Four bytes a pixel, so that one gather of 32-bit words fetches all channels.
    packed = pad(images, (0, 1)).view(torch.int32).view(-1)
    values = packed.index_select(0, places.view(-1)).view(torch.uint8).view(taps_y, taps_x, -1, 4).to(torch.float32)
    values = _cubic(values.unbind(1), share_x) if taps_x == 4 else values[:, 0]
    values = _cubic(values.unbind(0), share_y) if taps_y == 4 else values[0]
    sampled = values.clamp_(0, 255).to(torch.uint8).view(torch.int32).view(count, height, width)
    colour = int.from_bytes(bytes((*fill, 0)), byteorder, signed=True)
    return torch.where(inside, sampled, colour).view(torch.uint8).view(count, height, width, 4)[..., :3]


def _neighbours(source: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Along one axis, for places `source` [n, H, W]: whether they are inside the image, bool [n, H, W]; the four pixels
    about each, clamped to the image, int32 [4, n, H, W]; and how far it is from the second to the third, float32
    [n * H * W, 4], the same in each channel."""
    inside = (source >= 0) & (source < size)
    centred = source - 0.5
    before = centred.floor()
    share = (centred - before).to(torch.float32).view(-1, 1).expand(-1, 4).contiguous()
    offsets = torch.arange(-1, 3, dtype=torch.int32, device=source.device).view(4, 1, 1, 1)
    return inside, (before.to(torch.int32) + offsets).clamp_(0, size - 1), share


def _cubic(values: Sequence[Tensor], t: Tensor) -> Tensor:
    """The cubic through four neighbours (overwritten), float32 [..., pixels, 4], at t [pixels, 4], by PIL's scheme.

    v2 + t ((v3 - v1) + t ((2 (v1 - v2) + v3 - v4) + t (v2 - v1 + v3 - v4))) with the last bracket's sign turned.
    """
    v1, v2, v3, v4 = values
    slope = v3 - v1
    first, last = v1.sub_(v2), v3.sub_(v4)
    bend = last.add_(first)
    square = first.add_(bend)
    return square.sub_(bend.mul_(t)).mul_(t).add_(slope).mul_(t).add_(v2)

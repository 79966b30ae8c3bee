"""Rotate, shears and translations, resampled as PIL's Image.transform does it.

PIL's bicubic transform kernel has a = -1 (its resize has -.5, torch's grid_sample -.75), clamps its 4 x 4 neighbours to
the image, truncates to 8 bits, and fills where the centre of sampling leaves the image. Shears and translations sample
on whole rows or columns, where the kernel needs 4 neighbours of the 16.
"""

from __future__ import annotations

from collections.abc import Sequence
from sys import byteorder
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from pipeline.augment.ops import Op

# Pixels resampled at once, at some 300 bytes each: on a CPU, what its caches hold; elsewhere, what memory allows.
_BLOCK = {"cpu": 1 << 14}
_BLOCK_ELSEWHERE = 1 << 20


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
    return _resample(images, tensors[0], fill, taps_x=4, taps_y=4)


def along_x(images: Tensor, tensors: Sequence[Tensor], fill: tuple[int, int, int]) -> Tensor:
    """Maps that keep y."""
    return _resample(images, tensors[0], fill, taps_x=4, taps_y=1)


def along_y(images: Tensor, tensors: Sequence[Tensor], fill: tuple[int, int, int]) -> Tensor:
    """Maps that keep x."""
    return _resample(images, tensors[0], fill, taps_x=1, taps_y=4)


def _resample(images: Tensor, maps: Tensor, fill: tuple[int, int, int], *, taps_x: int, taps_y: int) -> Tensor:
    count, height, width, _ = images.shape
    device = images.device
    # Coordinates in float64, as PIL has them: a pixel on the edge falls on the same side.
    a, b, c, d, e, f = maps.view(count, 6, 1, 1).unbind(1)
    x = torch.arange(width, dtype=torch.float64, device=device) + 0.5
    y = torch.arange(height, dtype=torch.float64, device=device)[:, None] + 0.5
    source_x, source_y = a * x + b * y + c, d * x + e * y + f
    inside = (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)
    left, right_share = _split(source_x)
    top, bottom_share = _split(source_y)
    first = torch.arange(count, dtype=torch.int32, device=device)[:, None, None] * (height * width)
    first = first.expand(count, height, width).reshape(-1)

    # Four bytes a pixel, so that one gather of 32-bit words fetches all channels.
    packed = pad(images, (0, 1)).view(torch.int32).view(-1)
    offsets_x, offsets_y = (_offsets(taps, device) for taps in (taps_x, taps_y))
    result = torch.empty(count * height * width, 4, dtype=torch.uint8, device=device)
    block = _BLOCK.get(device.type, _BLOCK_ELSEWHERE)
    for start in range(0, len(result), block):
        part = slice(start, start + block)
        columns = (left[part] + offsets_x).clamp_(0, width - 1)
        rows = (top[part] + offsets_y).clamp_(0, height - 1).mul_(width).add_(first[part])
        places = rows[:, None] + columns
        values = packed.index_select(0, places.view(-1)).view(torch.uint8).view(taps_y, taps_x, -1, 4)
        values = values.to(torch.float32)
        values = _cubic(values.unbind(1), right_share[part]) if taps_x == 4 else values[:, 0]
        values = _cubic(values.unbind(0), bottom_share[part]) if taps_y == 4 else values[0]
        result[part] = values.clamp_(0, 255)
    colour = int.from_bytes(bytes((*fill, 0)), byteorder)
    words = torch.where(inside, result.view(torch.int32).view(inside.shape), colour)
    return words.view(torch.uint8).view(count, height, width, 4)[..., :3]


def _split(source: Tensor) -> tuple[Tensor, Tensor]:
    """The pixel before each place, int32 [pixels], and how far the place is on the way to the next, float32
    [pixels, 1]."""
    centred = source - 0.5
    before = centred.floor()
    return before.to(torch.int32).view(-1), (centred - before).to(torch.float32).view(-1, 1)


def _offsets(taps: int, device: torch.device) -> Tensor:
    """int32 [taps, 1], from the pixel before."""
    first = -1 if taps == 4 else 0
    return torch.arange(first, first + taps, dtype=torch.int32, device=device)[:, None]


def _cubic(values: Sequence[Tensor], share: Tensor) -> Tensor:
    """The cubic through four neighbours (overwritten), float32 [..., pixels, 4], by PIL's Horner scheme.

    v2 + t ((v3 - v1) + t ((2 (v1 - v2) + v3 - v4) + t (v2 - v1 + v3 - v4))) with the last bracket's sign turned.
    """
    v1, v2, v3, v4 = values
    t = share.expand(-1, 4).contiguous()
    slope = v3 - v1
    first, last = v1.sub_(v2), v3.sub_(v4)
    bend = last.add_(first)
    square = first.add_(bend)
    return square.sub_(bend.mul_(t)).mul_(t).add_(slope).mul_(t).add_(v2)

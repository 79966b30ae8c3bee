"""Eight RandAugment operations that are lookup tables: a new value for each old value, per sample and channel.

The tables of five operations depend on the drawn argument only and are computed on the host. Those of AutoContrast,
Equalize and Contrast depend on the image and are computed on the device. One gather applies all tables. The results are
exactly the bytes of PIL.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.augment.ops import Op
from pipeline.augment.torch_impl.blocks import by_block

OPS = (
    Op.AUTO_CONTRAST,
    Op.EQUALIZE,
    Op.INVERT,
    Op.POSTERIZE,
    Op.SOLARIZE,
    Op.SOLARIZE_ADD,
    Op.CONTRAST,
    Op.BRIGHTNESS,
)
HISTOGRAM_OPS = (Op.AUTO_CONTRAST, Op.EQUALIZE, Op.CONTRAST)  # operations whose tables depend on the image's histogram
LEVELS = 256
# PIL's mode L: ITU-R 601-2 weights of red, green and blue in 16-bit fixed point, with rounding.
LUMA, LUMA_HALF, LUMA_BITS = (19595, 38470, 7471), 0x8000, 16


def prepare(ops: NDArray[np.int64], arguments: NDArray[np.float64], size: int) -> list[NDArray[Any]]:
    """Return the arrays that `run` needs.

    Returns:
        The tables computed on the host, uint8 [n, 256], with the identity for operations whose table the device
        computes; the rows of AutoContrast, Equalize and Contrast, int64 each; the factors of Contrast, float32.
    """
    contrast = np.flatnonzero(ops == Op.CONTRAST)
    return [
        host_tables(ops, arguments),
        np.flatnonzero(ops == Op.AUTO_CONTRAST),
        np.flatnonzero(ops == Op.EQUALIZE),
        contrast,
        arguments[contrast].astype(np.float32),
    ]


def host_tables(ops: NDArray[np.int64], arguments: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Compute the tables of Invert, Posterize, Solarize, SolarizeAdd and Brightness, uint8 [n, 256].

    Other operations get the identity.
    """
    old = np.arange(LEVELS)
    tables = np.tile(old.astype(np.uint8), (len(ops), 1))
    for op, new in _HOST_TABLES.items():
        rows = np.flatnonzero(ops == op)
        if len(rows):
            tables[rows] = new(old, arguments[rows, None]).astype(np.uint8)
    return tables


def _posterize(old: NDArray[np.int64], kept_bits: NDArray[np.float64]) -> NDArray[np.int64]:
    dropped = 8 - np.clip(kept_bits.astype(np.int64), 0, 8)
    return (old >> dropped) << dropped


# Functions that map the old values [256] and the arguments [n, 1] to the new values, [n, 256] or [256].
_HOST_TABLES: dict[Op, Callable[[NDArray[np.int64], NDArray[np.float64]], NDArray[Any]]] = {
    Op.INVERT: lambda old, _: 255 - old,
    Op.POSTERIZE: _posterize,
    Op.SOLARIZE: lambda old, threshold: np.where(old < threshold, old, 255 - old),
    Op.SOLARIZE_ADD: lambda old, summand: np.where(old < 128, np.minimum(old + summand, 255), old),
    Op.BRIGHTNESS: lambda old, factor: np.clip(old.astype(np.float32) * factor.astype(np.float32), 0, 255),
}


def run(images: Tensor, tensors: Sequence[Tensor], fill: tuple[int, int, int]) -> Tensor:
    """Compute the tables that depend on the images, then apply all tables.

    uint8 [n, H, W, 3], contiguous -> uint8 [n, H, W, 3].
    """
    host, auto_contrast, equalize, contrast, factors = tensors
    tables = host.repeat(1, 3).view(-1, 3, LEVELS)
    for rows, make in (
        (auto_contrast, auto_contrast_tables),
        (equalize, partial(by_block, equalize_tables)),
        (contrast, lambda chosen: by_block(contrast_tables, chosen, factors)),
    ):
        if rows.numel():
            tables.index_copy_(0, rows, make(images.index_select(0, rows)))
    return by_block(_look_up, images, tables)


def _look_up(images: Tensor, tables: Tensor) -> Tensor:
    indices = _table_indices(images, torch.int32)
    return tables.reshape(-1).index_select(0, indices.view(-1)).view(images.shape)


def auto_contrast_tables(images: Tensor) -> Tensor:
    """Compute tables that stretch the range of each channel to 0 to 255, uint8 [n, 3, 256].

    A channel with only one value is unchanged.
    """
    low, high = (value.to(torch.float64)[..., None] for value in _extremes(images))
    # Divide two tensors, because PyTorch computes `255.0 / x` as 255 times the reciprocal, which rounds twice.
    scale = torch.full_like(low, 255.0) / (high - low).clamp(min=1.0)
    old = torch.arange(LEVELS, device=images.device)
    new = (old * scale - low * scale).clamp(0, 255)
    return torch.where(high > low, new, old.to(torch.float64)).to(torch.uint8)


def equalize_tables(images: Tensor) -> Tensor:
    """Compute tables that equalize the histogram of each channel, in PIL's integer arithmetic, uint8 [n, 3, 256]."""
    counts = _histograms(images)
    _, high = _extremes(images)
    last = counts.gather(2, high.to(torch.int64)[..., None])
    pixels = images.shape[1] * images.shape[2]
    step = torch.div(pixels - last, 255, rounding_mode="floor")
    below = counts.cumsum(2) - counts
    new = torch.div(step // 2 + below, step.clamp(min=1), rounding_mode="floor").clamp(max=255)
    old = torch.arange(LEVELS, device=images.device)
    return torch.where(step > 0, new, old).to(torch.uint8)


def contrast_tables(images: Tensor, factors: Tensor) -> Tensor:
    """Compute tables that blend with the rounded mean luma of the image, uint8 [n, 3, 256], the same in all channels.

    Args:
        images: uint8 [n, H, W, 3].
        factors: float32 [n]: blending factors.
    """
    pixels = images.shape[1] * images.shape[2]
    total = luma(images).sum(dim=(1, 2), dtype=torch.int64)
    mean = torch.div(2 * total + pixels, 2 * pixels, rounding_mode="floor").to(torch.float32)[:, None]
    old = torch.arange(LEVELS, device=images.device, dtype=torch.float32)
    new = (old - mean).mul_(factors[:, None]).add_(mean).clamp_(0, 255)
    return new.to(torch.uint8)[:, None].expand(-1, 3, -1)


def luma(images: Tensor) -> Tensor:
    """Convert to PIL's mode L: uint8 [n, H, W, 3] -> int32 [n, H, W], 0 to 255."""
    red, green, blue = images.to(torch.int32).unbind(3)
    return (red * LUMA[0] + green * LUMA[1] + blue * LUMA[2] + LUMA_HALF) >> LUMA_BITS


def _extremes(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the minimum and the maximum of each channel, uint8 [n, 3] each.

    Rows are reduced first, so that a CPU can use long vectors.
    """
    count, height, width, _ = images.shape
    rows = images.view(count, height, width * 3)
    return rows.amin(1).view(count, width, 3).amin(1), rows.amax(1).view(count, width, 3).amax(1)


def _histograms(images: Tensor) -> Tensor:
    """Count the values of each channel, int64 [n, 3, 256]."""
    indices = _table_indices(images, torch.int64).view(-1)
    counts = torch.zeros(len(images) * 3 * LEVELS, dtype=torch.int64, device=images.device)
    one = torch.ones(1, dtype=torch.int64, device=images.device)
    return counts.scatter_add_(0, indices, one.expand(len(indices))).view(-1, 3, LEVELS)


def _table_indices(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the index of each value in flattened tables [n, 3, 256]; dtype [n, H, W * 3]."""
    count, height, width, _ = images.shape
    channel = torch.arange(3, dtype=dtype, device=images.device).repeat(width) * LEVELS
    sample = torch.arange(count, dtype=dtype, device=images.device)[:, None, None] * (3 * LEVELS)
    return images.view(count, height, width * 3).to(dtype).add_(channel + sample)

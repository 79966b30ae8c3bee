"""The preprocessing of evaluation as a function of one image: resize, crop the center, normalize."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from fat.features import CROP_PCT, INTERPOLATION, MEAN, SIZE, STD
from fat.inference.pil_image import rgb_pixels
from fat.model import MIN_SIZE
from fat.weights.header import MAX_SIZE, Channels, WeightsInfo
from fat.weights.safe_pickle import printable

if TYPE_CHECKING:
    from PIL.Image import Image

# As in evaluation (`pipeline.jobs`): ratio of the sides above which only a part of the image is resized, and source
# pixels that the bicubic filter reads on each side of its center.
MAX_ASPECT = 8
CUBIC_SUPPORT = 2


@dataclass(frozen=True)
class ImageTransform:
    """Prepare images for a model with exactly the pixels of an evaluation on a CPU.

    The short side is resized to size / crop_pct pixels with a bicubic, antialiasing filter, the center is cropped, and
    the channels are normalized. The result differs from that of timm and torchvision, which resize with Pillow, by
    rounding: at most 2 of 255 levels. On a GPU, DALI decodes and resizes for evaluations, with other rounding.
    """

    size: int = SIZE
    """Side of the result in pixels, 32 to 8192."""
    crop_pct: float = CROP_PCT
    """Fraction of the short side that the crop keeps, in [0.1, 1]."""
    mean: Channels = MEAN
    """Mean of red, green and blue that is subtracted from values in 0 to 1."""
    std: Channels = STD
    """Standard deviation of red, green and blue, by which the difference is divided."""

    def __post_init__(self) -> None:
        if not MIN_SIZE <= self.size <= MAX_SIZE:
            raise ValueError(f"size {self.size}: expected {MIN_SIZE} to {MAX_SIZE:,} pixels")
        if not 0.1 <= self.crop_pct <= 1:  # a small one would resize images to a huge size
            raise ValueError(f"crop_pct {self.crop_pct:g}: expected 0.1 to 1")

    @classmethod
    def of(cls, info: WeightsInfo, *, size: int | None = None, crop_pct: float | None = None) -> ImageTransform:
        """Return the transform that a weights file records; timm's defaults for what it does not record.

        Args:
            info: metadata of the file, from `fat.read_info`.
            size, crop_pct: replace those of the file.

        Raises:
            ValueError: the file requires another interpolation than bicubic, or a value is out of range.
        """
        if info.interpolation not in (None, INTERPOLATION):
            raise ValueError(
                f"interpolation {printable(info.interpolation)!r} is not supported; expected {INTERPOLATION!r}"
            )
        return cls(
            size=size or info.size or SIZE,
            crop_pct=crop_pct or info.crop_pct or CROP_PCT,
            mean=info.mean or MEAN,
            std=info.std or STD,
        )

    def __call__(self, image: Tensor | Image) -> Tensor:
        """Return normalized images on the CPU: float32 [3, size, size], or [B, 3, size, size] for a batch.

        Args:
            image: PIL image of any mode (`rgb_pixels` converts it to RGB), or uint8 tensor [C, H, W] or [B, C, H, W] on
                the CPU; C = 3 (RGB) or 1 (gray). An EXIF orientation is not applied: neither is it in training. To
                apply it, pass `PIL.ImageOps.exif_transpose(image)`.

        Raises:
            ValueError: the tensor has another dtype, shape or device, or the values of the PIL image that are black and
                white are unknown.
        """
        return self.normalize(self.crop(image))

    def normalize(self, pixels: Tensor) -> Tensor:
        """Return the normalized pixels of `crop`: uint8 -> float32, of the same shape and on the same device."""
        mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (self.mean, self.std))
        scale, offset = (1 / (255 * std)).float(), (-mean / std).float()
        # One multiplication and one addition in float32, with the rounding of evaluation.
        return pixels.float().mul_(scale.to(pixels.device)).add_(offset.to(pixels.device))

    def crop(self, image: Tensor | Image) -> Tensor:
        """Return the pixels before normalization: uint8 [3, size, size], or [B, 3, size, size]. See `__call__`."""
        pixels = image if isinstance(image, Tensor) else rgb_pixels(image)
        if pixels.dtype != torch.uint8 or pixels.device.type != "cpu":
            raise ValueError(
                f"images are {pixels.dtype} on {pixels.device}; expected torch.uint8 on the CPU, with values 0 to 255"
            )
        if pixels.ndim not in (3, 4) or pixels.shape[-3] not in (1, 3) or 0 in pixels.shape:
            raise ValueError(
                f"images have the shape {list(pixels.shape)}; expected [3, H, W] or [B, 3, H, W] (RGB), or 1 for "
                "gray instead of 3"
            )
        batch = pixels.reshape(-1, *pixels.shape[-3:]).expand(-1, 3, -1, -1)
        return self._resize_and_crop(batch).reshape(*pixels.shape[:-3], 3, self.size, self.size)

    def _resize_and_crop(self, images: Tensor) -> Tensor:
        rows, columns = self._sides(images.shape[-2], images.shape[-1])
        window = images[..., rows.low : rows.high, columns.low : columns.high]
        if rows.is_whole and columns.is_whole:
            size = (round(rows.resized), round(columns.resized))
            if window.shape[-2:] != size:
                window = window.contiguous(memory_format=torch.channels_last)
                window = functional.interpolate(window, size=size, mode=INTERPOLATION, antialias=True)
            top, left = round(rows.corner), round(columns.corner)
            return window[..., top : top + self.size, left : left + self.size]
        return torch.stack([self._resize_region(each, rows, columns) for each in window])

    def _resize_region(self, window: Tensor, rows: _Side, columns: _Side) -> Tensor:
        """Resize a region with fractional borders, which PyTorch cannot, with Pillow."""
        from PIL import Image

        # Rounding errors may move the region's border outside the window.
        right, bottom = (min(side.start + side.extent, side.high - side.low) for side in (columns, rows))
        source: Any = window.permute(1, 2, 0).numpy().copy()
        box = (columns.start, rows.start, right, bottom)
        resized = Image.fromarray(source).resize((self.size, self.size), Image.Resampling.BICUBIC, box)
        return rgb_pixels(resized)

    def _sides(self, height: int, width: int) -> tuple[_Side, _Side]:
        """Return the parts of rows and columns that are resized, with the rounding of torchvision and timm."""
        short, shortest = int(self.size / self.crop_pct), min(height, width)

        def side(pixels: int) -> _Side:
            resized = short * pixels // shortest
            anchor, scale = round((resized - self.size) / 2), pixels / resized
            start, extent, low, high = anchor * scale, self.size * scale, 0, pixels
            if pixels > MAX_ASPECT * shortest:  # resizing all of 65,500 x 2 pixels would take gigabytes
                reach = CUBIC_SUPPORT * max(scale, 1) + 1  # plus 1, because bounds are rounded
                low = max(math.floor(start - reach), 0)
                high = min(math.ceil(start + extent + reach), pixels)
            return _Side(low, high, start - low, extent, self.size / extent)

        return side(height), side(width)


@dataclass(frozen=True)
class _Side:
    """Rows or columns of an image: a window from `low` to `high`, and the region of it that becomes the result."""

    low: int
    high: int
    start: float
    """First pixel of the region, in pixels of the window; may be fractional, as may `extent`."""
    extent: float
    scale: float
    """Pixels of the result per source pixel."""

    @property
    def resized(self) -> float:
        """Pixels of the window after resizing."""
        return (self.high - self.low) * self.scale

    @property
    def corner(self) -> float:
        """First pixel of the region after resizing the window."""
        return self.start * self.scale

    @property
    def is_whole(self) -> bool:
        """Whether the result can be computed by resizing the window to whole pixels and cropping."""
        return all(abs(value - round(value)) < 1e-6 for value in (self.resized, self.corner))

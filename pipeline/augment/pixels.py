"""Pixels of a decoded batch, on its device: RandAugment, normalisation, erasing. Mixing (`mix`) comes after.

Which sample gets what is decided on the host, from the parameters, so that no kernel's result is ever waited for.
Samples that share a family of operations go through it together; families are those that run the same kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.augment import blend, geometry, tables
from pipeline.augment.erase import Eraser
from pipeline.augment.mix import mix, mix_targets
from pipeline.augment.ops import Op
from pipeline.augment.params import SampleParams
from pipeline.augment.recipe import AugmentRecipe, Colour
from pipeline.augment.transfer import upload

__all__ = ["BatchAugment", "mix", "mix_targets", "normalise"]

Arrays = list[NDArray[Any]]


@dataclass(frozen=True)
class Family:
    """Operations that share their kernels.

    `prepare(ops [n], arguments [n], size)` makes the arrays that `run(images [n, H, W, 3], arrays, recipe's fill)`
    needs on the device.
    """

    ops: tuple[Op, ...]
    prepare: Callable[[NDArray[np.int64], NDArray[np.float64], int], Arrays]
    run: Callable[[Tensor, Sequence[Tensor], tuple[int, int, int]], Tensor]


FAMILIES = (
    Family(tables.OPS, tables.prepare, tables.run),
    Family((Op.COLOR,), blend.prepare, blend.colour),
    Family((Op.SHARPNESS,), blend.prepare, blend.sharpness),
    Family((Op.SHEAR_X, Op.TRANSLATE_X), geometry.prepare, geometry.along_x),
    Family((Op.SHEAR_Y, Op.TRANSLATE_Y), geometry.prepare, geometry.along_y),
    Family((Op.ROTATE,), geometry.prepare, geometry.rotate),
)


class BatchAugment:
    """RandAugment, normalisation and erasing of one batch after another.

    Args:
        recipe: what to do.
        device: where the images are.
        dtype: of the result, floating.
        flip: also do the horizontal flips, for decoders that have not.
    """

    def __init__(
        self, recipe: AugmentRecipe, device: torch.device, dtype: torch.dtype = torch.float32, *, flip: bool = False
    ) -> None:
        self._recipe, self._device, self._dtype, self._flip = recipe, device, dtype, flip
        self._eraser = Eraser(device)

    def __call__(self, images: Tensor, params: SampleParams) -> Tensor:
        """The augmented samples; `images` itself is left as it is.

        Args:
            images: uint8 [B, size, size, 3], RGB, contiguous, cropped and resized.
            params: the draws for these B samples.

        Returns:
            dtype [B, 3, size, size] with channels-last strides.

        Raises:
            ValueError: another shape or dtype.
        """
        result = normalise(self.operate(images, params), self._recipe.mean, self._recipe.std, self._dtype)
        self._eraser(result, params)
        return result

    def operate(self, images: Tensor, params: SampleParams) -> Tensor:
        """The part on 8-bit pixels: flips, if they are ours to do, and RandAugment. uint8 [B, size, size, 3], new or,
        where nothing is to be done, `images` itself."""
        size = self._recipe.size
        if images.shape != (len(params), size, size, 3) or images.dtype != torch.uint8:
            raise ValueError(
                f"uint8 [{len(params)}, {size}, {size}, 3] expected, {images.dtype} {list(images.shape)} found"
            )
        stages = self._stages(params)
        if not stages:
            return images
        tensors = iter(upload([array for _, arrays in stages for array in arrays], self._device))
        images = images.clone()
        for run, arrays in stages:
            rows, *rest = [next(tensors) for _ in arrays]
            images.index_copy_(0, rows, run(images.index_select(0, rows), rest, self._recipe.fill))
        return images

    def _stages(self, params: SampleParams) -> list[tuple[Callable[..., Tensor], Arrays]]:
        """What is run, in order: a function of (images, tensors, fill), and its arrays, the first being the rows."""
        stages: list[tuple[Callable[..., Tensor], Arrays]] = []
        if self._flip and params.flips.any():
            stages.append((_flipped, [np.flatnonzero(params.flips)]))
        for layer in range(params.ops.shape[1]):
            ops, arguments = params.ops[:, layer], params.arguments[:, layer]
            for family in FAMILIES:
                rows = np.flatnonzero(params.applied[:, layer] & np.isin(ops, family.ops))
                if len(rows):
                    stages.append((family.run, [rows, *family.prepare(ops[rows], arguments[rows], self._recipe.size)]))
        return stages


def normalise(images: Tensor, mean: Colour, std: Colour, dtype: torch.dtype) -> Tensor:
    """(images / 255 - mean) / std, computed in float32.

    Args:
        images: uint8 [B, H, W, 3], contiguous.
        mean, std: per channel, on the 0..1 scale.

    Returns:
        dtype [B, 3, H, W] with channels-last strides.
    """
    batch, height, width, _ = images.shape
    scale, offset = _scale_and_offset(mean, std, width, images.device)
    rows = images.view(batch * height, width * 3)
    if images.is_cuda:  # two kernels in all, each converting as it goes: a GPU pays by the byte
        result = torch.empty_like(rows, dtype=dtype)
        torch.add(torch.mul(rows, scale), offset, out=result)
    else:  # mixed-type arithmetic is ten times slower on a CPU than a conversion and work in place
        result = rows.to(torch.float32).mul_(scale).add_(offset).to(dtype)
    return result.view(batch, height, width, 3).permute(0, 3, 1, 2)


@lru_cache(maxsize=16)
def _scale_and_offset(mean: Colour, std: Colour, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A row of pixels each, float32 [width * 3]: a broadcast along three channels would be slow."""
    scale = 1.0 / (255.0 * np.asarray(std))
    offset = -np.asarray(mean) / np.asarray(std)
    rows = [np.tile(values.astype(np.float32), width) for values in (scale, offset)]
    first, second = upload(rows, device)
    return first, second


def _flipped(images: Tensor, tensors: Sequence[Tensor], fill: tuple[int, int, int]) -> Tensor:
    return images.flip(2)

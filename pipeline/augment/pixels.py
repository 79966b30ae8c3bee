"""Pixels of a decoded batch, on its device: RandAugment, normalisation, erasing, mixing.

Which sample gets what is decided on the host, from the parameters, so that no kernel's result is ever waited for.
On a GPU our own kernels do it all (randaugment.py, finishing.py). Here is what they are held to, in torch: samples that
share a family of operations go through it together.
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

from pipeline.augment.kernels import FINISHING, RANDAUGMENT, available, switched_off
from pipeline.augment.ops import Op
from pipeline.augment.params import MixParams, SampleParams, draw, mix_params
from pipeline.augment.recipe import AugmentRecipe, Colour, scale_and_offset
from pipeline.augment.torch_impl import blend, geometry, tables
from pipeline.augment.torch_impl.erase import QUANTILES, Eraser
from pipeline.augment.torch_impl.mix import mix, mix_targets
from pipeline.augment.transfer import upload

__all__ = ["BatchAugment", "launch_all", "mix", "mix_targets", "normalise"]

Arrays = list[NDArray[Any]]
Run = Callable[[Tensor, Sequence[Tensor], tuple[int, int, int]], Tensor]
Group = tuple[Run, Arrays]


@dataclass(frozen=True)
class OpGroup:
    """Operations that share their kernels.

    `prepare(ops [n], arguments [n], size)` makes the arrays that `run(images [n, H, W, 3], arrays, recipe's fill)`
    needs on the device.
    """

    ops: tuple[Op, ...]
    prepare: Callable[[NDArray[np.int64], NDArray[np.float64], int], Arrays]
    run: Run


OP_GROUPS = (
    OpGroup(tables.OPS, tables.prepare, tables.run),
    OpGroup((Op.COLOR,), blend.prepare, blend.colour),
    OpGroup((Op.SHARPNESS,), blend.prepare, blend.sharpness),
    OpGroup((Op.SHEAR_X, Op.TRANSLATE_X), geometry.prepare, geometry.along_x),
    OpGroup((Op.SHEAR_Y, Op.TRANSLATE_Y), geometry.prepare, geometry.along_y),
    OpGroup((Op.ROTATE,), geometry.prepare, geometry.rotate),
)


class BatchAugment:
    """RandAugment, normalisation, erasing and mixing of one batch after another, by our own kernels where they serve
    (`pipeline.augment.kernels`).

    Args:
        recipe: what to do.
        device: where the images are.
        dtype: of the result, floating.
        flip: also do the horizontal flips, for decoders that have not.
        kernels: use our own kernels where there are any for the device; else torch.
    """

    def __init__(
        self,
        recipe: AugmentRecipe,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        *,
        flip: bool = False,
        kernels: bool = True,
    ) -> None:
        self._recipe, self._device, self._dtype, self._flip = recipe, device, dtype, flip
        self._kernels = kernels and available(device)
        self._eraser = Eraser(device)

    def __call__(self, images: Tensor, params: SampleParams, mixing: MixParams | None = None) -> Tensor:
        """The augmented samples; `images` itself is left as it is.

        Args:
            images: uint8 [B, size, size, 3], RGB, contiguous, cropped and resized.
            params: the draws for these B samples.
            mixing: how they are mixed in pairs, if they are.

        Returns:
            dtype [B, 3, size, size] with channels-last strides.

        Raises:
            ValueError: another shape or dtype, or an odd batch to mix.
        """
        recipe, images = self._recipe, self.apply_ops(images, params)
        if self._launches(FINISHING):
            from pipeline.augment.triton_impl.finishing import finish

            return finish(images, params, mixing, self._eraser.quantiles, recipe.mean, recipe.std, self._dtype)
        result = normalise(images, recipe.mean, recipe.std, self._dtype)
        self._eraser(result, params)
        return result if mixing is None else mix(result, mixing)

    def apply_ops(self, images: Tensor, params: SampleParams) -> Tensor:
        """The part on 8-bit pixels: flips, if they are ours to do, and RandAugment. uint8 [B, size, size, 3], new or,
        where nothing is to be done, `images` itself."""
        size = self._recipe.size
        if images.shape != (len(params), size, size, 3) or images.dtype != torch.uint8:
            raise ValueError(
                f"uint8 [{len(params)}, {size}, {size}, 3] expected, {images.dtype} {list(images.shape)} found"
            )
        if self._launches(RANDAUGMENT):
            from pipeline.augment.triton_impl import randaugment

            return randaugment.apply_ops(images, params, self._recipe.fill, flip=self._flip)
        stages = self._stages(params)
        if not stages:
            return images
        tensors = iter(upload([array for stage in stages for array in stage.arrays()], self._device))
        for stage in stages:
            results = []
            for run, arrays in stage.groups:
                rows, *rest = [next(tensors) for _ in arrays]
                results.append(run(images.index_select(0, rows), rest, self._recipe.fill))
            # Gathered back as whole samples: several times faster than scattering bytes into place.
            images = torch.cat(results).index_select(0, next(tensors))
        return images

    def _launches(self, family: str) -> bool:
        return self._kernels and family not in switched_off()

    def _stages(self, params: SampleParams) -> list[Stage]:
        stages = []
        if self._flip and params.flips.any():
            stages.append(Stage.of([(_flipped, [np.flatnonzero(params.flips)])], len(params)))
        for layer in range(params.ops.shape[1]):
            ops, arguments = params.ops[:, layer], params.arguments[:, layer]
            groups: list[Group] = []
            for group in OP_GROUPS:
                rows = np.flatnonzero(params.applied[:, layer] & np.isin(ops, group.ops))
                if len(rows):
                    groups.append((group.run, [rows, *group.prepare(ops[rows], arguments[rows], self._recipe.size)]))
            if groups:
                stages.append(Stage.of(groups, len(params)))
        return stages


@dataclass(frozen=True)
class Stage:
    """What happens to a batch at one time: every row is in one group."""

    groups: list[Group]
    """Functions of (images, tensors, fill), each with its arrays: the rows it is for, then what it needs."""
    back: NDArray[np.int64]
    """Where, among all groups' rows one after another, each row of the batch is found."""

    @staticmethod
    def of(groups: list[Group], batch: int) -> Stage:
        """With one more group, for the rows that stay as they are."""
        touched = np.concatenate([arrays[0] for _, arrays in groups])
        groups = [*groups, (_kept, [np.setdiff1d(np.arange(batch), touched)])]
        return Stage(groups, np.argsort(np.concatenate([arrays[0] for _, arrays in groups])))

    def arrays(self) -> Arrays:
        """All that goes to the device, in the order in which it is used."""
        return [*(array for _, arrays in self.groups for array in arrays), self.back]


def launch_all(recipe: AugmentRecipe, dtype: torch.dtype, *, batch: int = 64) -> None:
    """Launch every kernel that augments by this recipe, on black CPU images: for `fat.kernels.prefill`, which records
    launches and runs none. What is compiled depends on the recipe and on the dtype of the result, not on the batch.

    Args:
        batch: images; enough of them for every kind of operation to be drawn.
    """
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    from pipeline.augment.triton_impl import randaugment
    from pipeline.augment.triton_impl.finishing import finish

    sides, lanes = np.full(batch, recipe.size), np.arange(batch) // 2
    params = draw(recipe, seed=0, epoch=0, ids=np.arange(batch), heights=sides, widths=sides)
    mixing = mix_params(recipe, seed=0, step=0, lanes=lanes) if recipe.mixes else None
    with unset_fake_temporarily():  # parameters are NumPy arrays
        images = torch.zeros(batch, recipe.size, recipe.size, 3, dtype=torch.uint8)
        randaugment.apply_ops(images, params, recipe.fill, flip=False)
        finish(images, params, mixing, torch.zeros(QUANTILES), recipe.mean, recipe.std, dtype)


def normalise(images: Tensor, mean: Colour, std: Colour, dtype: torch.dtype) -> Tensor:
    """(images / 255 - mean) / std, computed in float32.

    Args:
        images: uint8 [B, H, W, 3], contiguous.
        mean, std: per channel, on the 0..1 scale.

    Returns:
        dtype [B, 3, H, W] with channels-last strides.
    """
    batch, height, width, _ = images.shape
    stream = torch.cuda.current_stream(images.device).cuda_stream if images.is_cuda else 0
    scale, offset = _scale_and_offset(mean, std, width, images.device, stream)
    rows = images.view(batch * height, width * 3)
    if images.is_cuda:  # two kernels in all, each converting as it goes: a GPU pays by the byte
        result = torch.empty_like(rows, dtype=dtype)
        torch.add(torch.mul(rows, scale), offset, out=result)
    else:  # mixed-type arithmetic is ten times slower on a CPU than a conversion and work in place
        result = rows.to(torch.float32).mul_(scale).add_(offset).to(dtype)
    return result.view(batch, height, width, 3).permute(0, 3, 1, 2)


@lru_cache(maxsize=16)
def _scale_and_offset(
    mean: Colour, std: Colour, width: int, device: torch.device, stream: int
) -> tuple[Tensor, Tensor]:
    """A row of pixels each, float32 [width * 3]: a broadcast along three channels would be slow. Kept for each stream,
    since what one has queued another cannot know to be there."""
    first, second = upload(scale_and_offset(mean, std, width), device)
    return first, second


def _flipped(images: Tensor, tensors: Sequence[Tensor], fill: tuple[int, int, int]) -> Tensor:
    return images.flip(2)


def _kept(images: Tensor, tensors: Sequence[Tensor], fill: tuple[int, int, int]) -> Tensor:
    return images

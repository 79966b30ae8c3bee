"""Apply augmentation to a decoded batch on its device: RandAugment, normalization, random erasing and mixing.

The host selects the samples of each operation from the parameters, so it never waits for a kernel's result. On a GPU,
this project's Triton kernels do all of the work (triton_impl/randaugment.py, triton_impl/finishing.py); on a CPU,
functions that Numba compiles (numba_impl/). Their reference in PyTorch is also here; it processes the samples of each
group of operations together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.augment.kernels import FINISHING, RANDAUGMENT, available, load_cpu_augment, switched_off
from pipeline.augment.ops import Op
from pipeline.augment.params import MixParams, SampleParams, draw, mix_params
from pipeline.augment.recipe import AugmentRecipe, Color, scale_and_offset
from pipeline.augment.torch_impl import blend, geometry, tables
from pipeline.augment.torch_impl.erase import QUANTILES, Eraser
from pipeline.augment.torch_impl.mix import mix, mix_targets
from pipeline.augment.transfer import upload
from pipeline.augment.workers import Workers

if TYPE_CHECKING:
    from pipeline.augment.numba_impl.batch import CpuAugment

__all__ = ["BatchAugment", "launch_all", "mix", "mix_targets", "normalize"]

Arrays = list[NDArray[Any]]
Run = Callable[[Tensor, Sequence[Tensor], tuple[int, int, int]], Tensor]
RowGroup = tuple[Run, Arrays]


@dataclass(frozen=True)
class OpGroup:
    """Operations that are computed together.

    `prepare(ops [n], arguments [n], size)` returns the arrays that are uploaded to the device as arguments of
    `run(images [n, H, W, 3], tensors, fill)`, which returns the new images.
    """

    ops: tuple[Op, ...]
    prepare: Callable[[NDArray[np.int64], NDArray[np.float64], int], Arrays]
    run: Run


OP_GROUPS = (
    OpGroup(tables.OPS, tables.prepare, tables.run),
    OpGroup((Op.COLOR,), blend.prepare, blend.color),
    OpGroup((Op.SHARPNESS,), blend.prepare, blend.sharpness),
    OpGroup((Op.SHEAR_X, Op.TRANSLATE_X), geometry.prepare, geometry.along_x),
    OpGroup((Op.SHEAR_Y, Op.TRANSLATE_Y), geometry.prepare, geometry.along_y),
    OpGroup((Op.ROTATE,), geometry.prepare, geometry.rotate),
)


class BatchAugment:
    """Applies RandAugment, normalization, random erasing and mixing to batches.

    Args:
        recipe: the augmentation recipe.
        device: device of the images.
        dtype: floating-point dtype of the result.
        flip: also apply the horizontal flips, for decoders that do not flip.
        kernels: use this project's Triton kernels if they are available on the device and enabled
            (`pipeline.augment.kernels`), and on a CPU the functions that Numba compiles; else PyTorch. The first object
            on a CPU compiles them, or loads them from Numba's cache.
        workers: threads and memory for a CPU. None: the calling thread.
    """

    def __init__(
        self,
        recipe: AugmentRecipe,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        *,
        flip: bool = False,
        kernels: bool = True,
        workers: Workers | None = None,
    ) -> None:
        self._recipe, self._device, self._dtype, self._flip = recipe, device, dtype, flip
        self._kernels = kernels and available(device)
        self._eraser = Eraser(device)
        self._on_cpu: CpuAugment | None = None
        if kernels and not self._kernels and device.type == "cpu" and (cpu_augment := load_cpu_augment()):
            self._on_cpu = cpu_augment(recipe, self._eraser.quantiles.numpy(), workers or Workers(1), flip=flip)

    def __call__(self, images: Tensor, params: SampleParams, mixing: MixParams | None = None) -> Tensor:
        """Return the augmented batch. `images` is not modified.

        Args:
            images: uint8 [B, size, size, 3], RGB, contiguous, cropped and resized.
            params: parameters of the B samples.
            mixing: mixing parameters of the B rows. None: rows are not mixed.

        Returns:
            dtype [B, 3, size, size], normalized, with channels-last strides.

        Raises:
            ValueError: `images` has another shape or dtype, or B is odd and rows are mixed.
        """
        recipe = self._recipe
        if self._on_cpu:
            self._check(images, params)
            return self._on_cpu(images, params, mixing).to(self._dtype)
        images = self.apply_ops(images, params)
        if self._uses_kernels(FINISHING):
            from pipeline.augment.triton_impl.finishing import finish

            return finish(images, params, mixing, self._eraser.quantiles, recipe.mean, recipe.std, self._dtype)
        result = normalize(images, recipe.mean, recipe.std, self._dtype)
        self._eraser(result, params)
        return result if mixing is None else mix(result, mixing)

    def apply_ops(self, images: Tensor, params: SampleParams) -> Tensor:
        """Apply the operations on 8-bit pixels: flips (if `flip` is set) and RandAugment.

        Returns:
            uint8 [B, size, size, 3]: a new tensor, or `images` itself if there is no operation to apply.
        """
        self._check(images, params)
        if self._on_cpu:
            return self._on_cpu.apply_ops(images, params)
        if self._uses_kernels(RANDAUGMENT):
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
            # Gather whole samples, which is several times faster than scattering their bytes.
            images = torch.cat(results).index_select(0, next(tensors))
        return images

    def _check(self, images: Tensor, params: SampleParams) -> None:
        size = self._recipe.size
        if images.shape != (len(params), size, size, 3) or images.dtype != torch.uint8:
            raise ValueError(
                f"expected uint8 [{len(params)}, {size}, {size}, 3], got {images.dtype} {list(images.shape)}"
            )

    def _uses_kernels(self, family: str) -> bool:
        return self._kernels and family not in switched_off()

    def _stages(self, params: SampleParams) -> list[Stage]:
        stages = []
        if self._flip and params.flips.any():
            stages.append(Stage.of([(_flip, [np.flatnonzero(params.flips)])], len(params)))
        for layer in range(params.ops.shape[1]):
            ops, arguments = params.ops[:, layer], params.arguments[:, layer]
            groups: list[RowGroup] = []
            for group in OP_GROUPS:
                rows = np.flatnonzero(params.applied[:, layer] & np.isin(ops, group.ops))
                if len(rows):
                    groups.append((group.run, [rows, *group.prepare(ops[rows], arguments[rows], self._recipe.size)]))
            if groups:
                stages.append(Stage.of(groups, len(params)))
        return stages


@dataclass(frozen=True)
class Stage:
    """Groups that apply at most one operation to each row of a batch. Every row is in exactly one group."""

    groups: list[RowGroup]
    """Functions of (images, tensors, fill), each with its arrays: its row indices, then the operations' arguments."""
    order: NDArray[np.int64]
    """int64 [B]: index of each row of the batch in the concatenated results of the groups."""

    @staticmethod
    def of(groups: list[RowGroup], batch: int) -> Stage:
        """Return a stage that consists of these groups and a group of the unchanged rows."""
        changed = np.concatenate([arrays[0] for _, arrays in groups])
        groups = [*groups, (_unchanged, [np.setdiff1d(np.arange(batch), changed)])]
        return Stage(groups, np.argsort(np.concatenate([arrays[0] for _, arrays in groups])))

    def arrays(self) -> Arrays:
        """Return all arrays that are uploaded to the device, in the order of their use."""
        return [*(array for _, arrays in self.groups for array in arrays), self.order]


def launch_all(recipe: AugmentRecipe, dtype: torch.dtype, *, batch: int = 64) -> None:
    """Launch every kernel that a recipe uses, on black CPU images, for `fat.kernels.prefill`, which records launches.

    The compiled code depends on the recipe and on the dtype of the result, not on the batch.

    Args:
        recipe: the augmentation recipe.
        dtype: dtype of the augmented batch.
        batch: number of images, large enough that every kind of operation is drawn.
    """
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    from pipeline.augment.triton_impl import randaugment
    from pipeline.augment.triton_impl.finishing import finish

    sides, lanes = np.full(batch, recipe.size), np.arange(batch) // 2
    params = draw(recipe, seed=0, epoch=0, ids=np.arange(batch), heights=sides, widths=sides)
    mixing = mix_params(recipe, seed=0, step=0, lanes=lanes) if recipe.mixes else None
    with unset_fake_temporarily():  # fake tensors cannot hold the parameters, which are NumPy arrays
        images = torch.zeros(batch, recipe.size, recipe.size, 3, dtype=torch.uint8)
        randaugment.apply_ops(images, params, recipe.fill, flip=False)
        finish(images, params, mixing, torch.zeros(QUANTILES), recipe.mean, recipe.std, dtype)


def normalize(images: Tensor, mean: Color, std: Color, dtype: torch.dtype) -> Tensor:
    """Compute (images / 255 - mean) / std in float32.

    Args:
        images: uint8 [B, H, W, 3], contiguous.
        mean, std: per channel, for values in 0 to 1.
        dtype: floating-point dtype of the result.

    Returns:
        dtype [B, 3, H, W] with channels-last strides.
    """
    batch, height, width, _ = images.shape
    stream = torch.cuda.current_stream(images.device).cuda_stream if images.is_cuda else 0
    scale, offset = _scale_and_offset(mean, std, width, images.device, stream)
    rows = images.view(batch * height, width * 3)
    if images.is_cuda:  # two kernels that also convert, because memory traffic limits a GPU
        result = torch.empty_like(rows, dtype=dtype)
        torch.add(torch.mul(rows, scale), offset, out=result)
    else:  # mixed-type arithmetic on a CPU is ten times slower than conversion and in-place arithmetic
        result = rows.to(torch.float32).mul_(scale).add_(offset).to(dtype)
    return result.view(batch, height, width, 3).permute(0, 3, 1, 2)


@lru_cache(maxsize=16)
def _scale_and_offset(
    mean: Color, std: Color, width: int, device: torch.device, stream: int
) -> tuple[Tensor, Tensor]:
    """Return the scale and offset that normalize a row of pixels, float32 [width * 3]; broadcasting would be slow.

    Cached per stream, because another stream would have to wait for the upload.
    """
    first, second = upload(scale_and_offset(mean, std, width), device)
    return first, second


def _flip(images: Tensor, tensors: Sequence[Tensor], fill: tuple[int, int, int]) -> Tensor:
    return images.flip(2)


def _unchanged(images: Tensor, tensors: Sequence[Tensor], fill: tuple[int, int, int]) -> Tensor:
    return images

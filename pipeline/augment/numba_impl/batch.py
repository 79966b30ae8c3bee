"""Augment batches on the CPU with the compiled functions, on the threads of `Workers`."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.augment.numba_impl.finishing import finish
from pipeline.augment.numba_impl.randaugment import apply_ops, scratch_bytes
from pipeline.augment.params import MixParams, SampleParams, draw, mix_params
from pipeline.augment.recipe import AugmentRecipe, scale_and_offset
from pipeline.augment.torch_impl import geometry, tables
from pipeline.augment.torch_impl.erase import quantiles
from pipeline.augment.torch_impl.mix import check_pairs
from pipeline.augment.workers import Workers

ROWS_PER_TASK = 8  # even, so that a task has complete pairs

Array = NDArray[Any]
Pixels = NDArray[np.uint8]


class CpuAugment:
    """Applies RandAugment, normalization, random erasing and mixing to batches on the CPU.

    Args:
        recipe: the augmentation recipe.
        quantiles: quantiles of the standard normal, float32 [65536].
        workers: the threads that share the samples of a batch, and the memory of the results.
        flip: also apply the horizontal flips.
    """

    def __init__(self, recipe: AugmentRecipe, quantiles: NDArray[np.float32], workers: Workers, *, flip: bool) -> None:
        self._size, self._flip, self._workers, self._quantiles = recipe.size, flip, workers, quantiles
        self._fill = np.array(recipe.fill, np.uint8)
        self._normalization = scale_and_offset(recipe.mean, recipe.std, recipe.size)

    def __call__(self, images: Tensor, params: SampleParams, mixing: MixParams | None) -> Tensor:
        """Augment a batch like `BatchAugment`.

        Args:
            images: uint8 [B, size, size, 3].
            params: parameters of the B samples.
            mixing: mixing parameters of the B rows. None: rows are not mixed.

        Returns:
            float32 [B, 3, size, size] with channels-last strides.

        Raises:
            ValueError: rows are mixed and B is odd, or there are not B mixing parameters.
        """
        batch, size = len(params), self._size
        pixels, jobs = _rows(images), self._jobs(params)
        erasing = _copies((params.erase_boxes, np.int32), (params.erase_keys, np.uint64))
        mixed = _mixing(batch, mixing)
        result = self._workers.buffers.empty((batch, size, size, 3), torch.float32)
        values = _rows(result)

        def augment(start: int) -> None:
            rows = slice(start, min(start + ROWS_PER_TASK, batch))
            finish(
                self._apply(pixels, jobs, rows),
                *self._normalization,
                *(array[rows] for array in erasing),
                self._quantiles,
                mixing is not None,
                *(array[rows] for array in mixed),
                values[rows],
            )

        self._workers.map(augment, range(0, batch, ROWS_PER_TASK))
        return result.permute(0, 3, 1, 2)

    def apply_ops(self, images: Tensor, params: SampleParams) -> Tensor:
        """Apply the operations on 8-bit pixels like `BatchAugment.apply_ops`."""
        pixels, jobs = _rows(images), self._jobs(params)
        result = self._workers.buffers.empty(tuple(images.shape), torch.uint8)
        values = _rows(result)

        def augment(start: int) -> None:
            rows = slice(start, min(start + ROWS_PER_TASK, len(params)))
            values[rows] = self._apply(pixels, jobs, rows)

        self._workers.map(augment, range(0, len(params), ROWS_PER_TASK))
        return result

    def _jobs(self, params: SampleParams) -> list[Array]:
        """Return the operations of a batch: the arguments from `flips` to `host_tables` of `randaugment.apply_ops`."""
        ops, arguments = params.ops[params.applied], params.arguments[params.applied]
        return _copies(
            (params.flips & self._flip, np.bool_),
            (np.concatenate([[0], np.cumsum(params.applied.sum(axis=1))]), np.int64),
            (ops, np.int64),
            (arguments, np.float32),
            (geometry.matrices(ops, arguments, self._size, self._size), np.float64),
            (tables.host_tables(ops, arguments), np.uint8),
        )

    def _apply(self, pixels: Pixels, jobs: list[Array], rows: slice) -> Pixels:
        """Apply the operations to some rows, uint8 [n, size * size * 3], in memory of this thread."""
        flips, first, *operations = jobs
        size, source = self._size, pixels[rows]
        needed = scratch_bytes(size, size)
        memory = self._workers.scratch(needed + source.nbytes)
        scratch, out = memory[:needed], memory[needed:].reshape(source.shape)
        own = first[rows.start : rows.stop + 1]
        apply_ops(source, flips[rows], own, *operations, self._fill, size, size, scratch, out)
        return out


def compile_functions() -> None:
    """Compile the functions, or load them from Numba's cache, by augmenting a batch of two pixels."""
    recipe = AugmentRecipe(size=1, rand_augment="rand-m9", mixup=1.0)
    side = np.ones(2, np.int64)
    params = draw(recipe, seed=0, epoch=0, ids=np.arange(2), heights=side, widths=side)
    augment = CpuAugment(recipe, quantiles(), Workers(1), flip=False)
    mixing = mix_params(recipe, seed=0, step=0, lanes=np.zeros(2, np.int64))
    images = torch.zeros(2, 1, 1, 3, dtype=torch.uint8)
    for _ in (apply_ops, finish):
        with contextlib.suppress(OSError):  # the code could not be stored, for instance on a full disk, but is usable
            augment(images, params, mixing)


def _mixing(batch: int, mixing: MixParams | None) -> list[Array]:
    """Return the arguments of `finish` for mixing: lam, use_cutmix, mix_boxes."""
    if mixing is None:
        return [np.ones(batch, np.float32), np.zeros(batch, np.bool_), np.zeros((batch, 4), np.int32)]
    check_pairs(batch, mixing)
    return _copies((mixing.lam, np.float32), (mixing.use_cutmix, np.bool_), (mixing.box, np.int32))


def _rows(images: Tensor) -> Array:
    """Return images as an array [B, H * W * 3], of the same memory if they are contiguous."""
    rows: Array = images.contiguous().view(len(images), -1).numpy()
    return rows


def _copies(*arrays: tuple[Array, type]) -> list[Array]:
    """Return contiguous, writable copies; for arrays of another kind, Numba would compile the function again."""
    return [np.array(array, dtype, order="C") for array, dtype in arrays]

"""Self-check of the augmentation kernels: compare them with PyTorch before a loader uses them.

RandAugment must produce exactly the bytes of PyTorch. A finished batch (normalized, erased and mixed) may differ by one
unit in the last place of its dtype plus 2^-18 of its largest value. The PyTorch reference runs on the CPU, where tests
compare it with PIL (docs/augmentation.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pipeline.augment import kernels
from pipeline.augment.ops import OPS, arguments
from pipeline.augment.params import MixParams, SampleParams, draw, mix_params
from pipeline.augment.pixels import BatchAugment, launch_all
from pipeline.augment.recipe import AugmentRecipe

SEED = 1
ROUNDING = 2.0**-18  # tolerance, a fraction of the largest value: fused multiply-add rounds differently
ODD_SIZE = 37
MAGNITUDE = 8.7
ERASE_PROBABILITY = 0.7  # replaces the erasing probability of a recipe with random erasing
FINISHING_BATCH = 8  # number of samples


@dataclass(frozen=True)
class Case:
    """One batch that is augmented by the kernels and by PyTorch."""

    family: str
    recipe: AugmentRecipe
    result: torch.dtype

    @property
    def families(self) -> tuple[str, ...]:
        return (self.family,)

    @property
    def operator(self) -> str:
        return self.family

    @property
    def shape(self) -> str:
        return f"images of {self.recipe.size}x{self.recipe.size}"

    @property
    def dtype(self) -> str:
        return "uint8" if self.family == kernels.RANDAUGMENT else str(self.result).removeprefix("torch.")

    def compare(self, device: torch.device) -> tuple[str, str] | None:
        """Return the failing kernel family and a description of the difference, or None. Kernel errors propagate."""
        compare = self._compare_randaugment if self.family == kernels.RANDAUGMENT else self._compare_finishing
        difference = compare(device)
        return None if difference is None else (self.family, difference)

    def launch(self) -> None:
        """Launch every kernel of this recipe on CPU images, to record the launches."""
        launch_all(self.recipe, self.result)

    def _compare_randaugment(self, device: torch.device) -> str | None:
        """Compare flips and every operation with arguments of both signs; some samples get a second operation."""
        ops = np.stack([np.repeat(OPS, 2), np.roll(np.repeat(OPS, 2), 9)], axis=1).astype(np.int64)
        batch = len(ops)
        images, params = _images(batch, self.recipe.size), _drawn(self.recipe, batch)
        signs = np.tile([[-1.0, 1.0], [1.0, 1.0]], (batch // 2, 1))
        magnitudes = np.full(ops.shape, MAGNITUDE)
        params = replace(
            params,
            ops=ops,
            applied=np.tile([True, False], (batch, 1)) | (np.arange(batch) % 3 == 0)[:, None],
            magnitudes=magnitudes,
            arguments=arguments(ops, magnitudes, signs, increasing=True),
        )
        found = BatchAugment(self.recipe, device, flip=True).apply_ops(images.to(device), params).cpu()
        exact = BatchAugment(self.recipe, torch.device("cpu"), flip=True, kernels=False).apply_ops(images, params)
        wrong = (found != exact).flatten(1).sum(1)
        if not bool(wrong.any()):
            return None
        worst = int(wrong.argmax())
        applied = ", ".join(OPS[op].title for op in params.ops[worst][params.applied[worst]])
        return f"{int(wrong.sum())} bytes of {found.numel()} differ from PyTorch (expected 0), most after {applied}"

    def _compare_finishing(self, device: torch.device) -> str | None:
        """Compare normalization, erasing, mixing and the conversion to the result's dtype."""
        images, params = _images(FINISHING_BATCH, self.recipe.size), _drawn(self.recipe, FINISHING_BATCH)
        mixing = _mixing(self.recipe)
        with kernels.disabled(kernels.RANDAUGMENT, *kernels.switched_off()):
            found = BatchAugment(self.recipe, device, self.result)(images.to(device), params, mixing).cpu()
        exact = BatchAugment(self.recipe, torch.device("cpu"), kernels=False)(images, params, mixing)
        allowed = torch.finfo(self.result).eps * exact.abs() + ROUNDING * exact.abs().max()
        error = (found.float() - exact).abs()
        passes = error <= allowed  # a comparison with NaN is False
        if bool(passes.all()):
            return None
        if invalid := int((~found.isfinite()).sum()):
            return f"{invalid} of {found.numel()} values are NaN or infinite"
        worst = int((error - allowed).argmax())
        return (
            f"error {float(error.flatten()[worst]):.3g} exceeds the tolerance of {float(allowed.flatten()[worst]):.3g} "
            f"({int((~passes).sum())} of {found.numel()} values are out of tolerance)"
        )


def cases(recipe: AugmentRecipe, dtype: torch.dtype) -> list[Case]:
    """Return the comparisons of a recipe, at its image size and at an odd size.

    Args:
        recipe: the augmentation recipe.
        dtype: dtype of the finished batches.
    """
    found = []
    for size in (recipe.size, ODD_SIZE):
        sized = replace(recipe, size=size)
        if recipe.policy is not None:
            found.append(Case(kernels.RANDAUGMENT, sized, dtype))
        plain = replace(sized, rand_augment=None, erase=ERASE_PROBABILITY if recipe.erase else 0.0)
        found.append(Case(kernels.FINISHING, plain, dtype))
    return found


def _images(batch: int, size: int) -> Tensor:
    """Return uint8 [batch, size, size, 3]: noise of all 256 levels and noise of 40 levels, alternating."""
    rng = np.random.default_rng(SEED)
    noise = rng.integers(256, size=(batch, size, size, 3))
    low = rng.integers(200, size=(batch, 1, 1, 3))
    few = np.where((np.arange(batch) % 2 == 0)[:, None, None, None], noise, low + noise % 40)
    return torch.from_numpy(few.astype(np.uint8))


def _drawn(recipe: AugmentRecipe, batch: int) -> SampleParams:
    sides = np.full(batch, 2 * recipe.size)
    return draw(recipe, seed=SEED, epoch=0, ids=np.arange(batch), heights=sides, widths=sides)


def _mixing(recipe: AugmentRecipe) -> MixParams | None:
    if not recipe.mixes:
        return None
    return mix_params(recipe, seed=SEED, step=0, lanes=np.arange(FINISHING_BATCH) // 2)

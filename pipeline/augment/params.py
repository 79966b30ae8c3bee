"""Draw the random parameters of augmentation, as NumPy arrays.

The parameters of a sample are pure functions of (seed, epoch, sample id). Those of mixing are pure functions of (seed,
step, lane); a lane is one of L contiguous streams that every batch interleaves. This module neither processes pixels
nor imports torch. All loaders use these parameters, so they all produce the same samples.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from pipeline import rng
from pipeline.augment.ops import MAX_MAGNITUDE, OPS, arguments
from pipeline.augment.recipe import AugmentRecipe
from pipeline.rng import Stream

Ints = NDArray[np.int64]
Boxes = NDArray[np.int32]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

TRIES = 10  # attempts to draw a crop or an erasing box that fits
CENTER_FRACTION = 224 / 256  # side of the center crop divided by the image's short side, as in evaluation
ERASE_AREA = (0.02, 1 / 3)  # smallest and largest area of the erased box, as fractions of the sample's area
ERASE_ASPECT = (0.3, 1 / 0.3)  # smallest and largest aspect ratio (height / width) of the erased box


@dataclass(frozen=True, kw_only=True)
class SampleParams:
    """Augmentation parameters of n samples. K is the number of RandAugment layers, 0 without RandAugment."""

    ids: Ints
    """int64 [n]: sample ids."""
    windows: Boxes
    """int32 [n, 4]: y, x, height, width of the crop window, in source pixels."""
    flips: Bools
    """bool [n]: whether the crop is flipped horizontally."""
    ops: NDArray[np.int64]
    """int64 [n, K]: RandAugment operations, values of `ops.Op`, in the order of their application."""
    applied: Bools
    """bool [n, K]: whether the operation is applied."""
    magnitudes: Floats
    """float64 [n, K]: magnitudes of the operations, 0 to 10."""
    arguments: Floats
    """float64 [n, K]: arguments of the operations, with their signs, in the units of `ops.arguments`."""
    erase_boxes: Boxes
    """int32 [n, 4]: y, x, height, width of the erased box, in pixels of the sample. All 0: nothing is erased."""
    erase_keys: NDArray[np.uint64]
    """uint64 [n]: the noise of each erased pixel is a hash of this key and the pixel's index in the box."""

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: slice | Ints) -> SampleParams:
        """Return the parameters of some of the samples, for instance of a micro-batch."""
        return SampleParams(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


@dataclass(frozen=True, kw_only=True)
class MixParams:
    """Mixing parameters of n rows. Rows 2i and 2i + 1 are a pair: each is mixed with the other, its partner."""

    lam: NDArray[np.float32]
    """float32 [n], 0 to 1: weight of a row's own image and label; 1: the row is not mixed."""
    box: Boxes
    """int32 [n, 4]: y, x, height, width of the box that CutMix copies from the partner. All 0 for mixup."""
    use_cutmix: Bools
    """bool [n]: CutMix (True) or mixup (False)."""

    def take(self, rows: slice | Ints) -> MixParams:
        """Return the parameters of some of the rows, which must be complete pairs."""
        return MixParams(lam=self.lam[rows], box=self.box[rows], use_cutmix=self.use_cutmix[rows])


def draw(
    recipe: AugmentRecipe,
    *,
    seed: int,
    epoch: int,
    ids: Ints,
    heights: NDArray[np.integer],
    widths: NDArray[np.integer],
) -> SampleParams:
    """Draw all parameters of n samples.

    Args:
        recipe: the augmentation recipe.
        seed: seed of the run.
        epoch: epoch, from 0.
        ids: int64 [n]: sample ids.
        heights, widths: integers [n]: sizes of the source images in pixels.
    """
    ops, applied, magnitudes, argument = _rand_augment(recipe, seed, epoch, ids)
    return SampleParams(
        ids=ids,
        windows=crop_windows(recipe, seed=seed, epoch=epoch, ids=ids, heights=heights, widths=widths),
        flips=flips(recipe, seed=seed, epoch=epoch, ids=ids),
        ops=ops,
        applied=applied,
        magnitudes=magnitudes,
        arguments=argument,
        erase_boxes=_erase_boxes(recipe, seed, epoch, ids),
        erase_keys=rng.bits(Stream.ERASE_NOISE, seed, epoch, ids),
    )


def crop_windows(
    recipe: AugmentRecipe,
    *,
    seed: int,
    epoch: int,
    ids: Ints,
    heights: NDArray[np.integer],
    widths: NDArray[np.integer],
) -> Boxes:
    """Draw crop windows (y, x, height, width) in source pixels, int32 [n, 4]. The arguments are those of `draw`.

    The random resized crop of Inception, as in torchvision and timm: of ten drawn areas and aspect ratios, the first
    that fits into the image is placed at a random position. If none fits, the window is the largest centered window
    with an aspect ratio in the permitted range.
    """
    height, width = np.asarray(heights, dtype=np.int64), np.asarray(widths, dtype=np.int64)
    if recipe.crop == "center":
        side = np.maximum(np.rint(np.minimum(height, width) * CENTER_FRACTION), 1)
        return _centered(height, width, side, side)
    draw_area, draw_aspect = _tries(Stream.CROP, seed, epoch, ids)
    area = _between(recipe.scale, draw_area) * (height * width)[:, None]
    aspect = rng.exp(_between(_log(recipe.ratio), draw_aspect))
    w, h = _rounded_root(area * aspect), _rounded_root(area / aspect)
    fits = (w > 0) & (h > 0) & (w <= width[:, None]) & (h <= height[:, None])
    windows = _placed((Stream.CROP, seed, epoch, ids), (h, w), (height, width), fits)
    found: Bools = np.any(fits, axis=1)
    if found.all():
        return windows
    low, high = recipe.ratio
    fallback = _centered(
        height, width, np.clip(np.rint(width / low), 1, height), np.clip(np.rint(height * high), 1, width)
    )
    return np.where(found[:, None], windows, fallback)


def flips(recipe: AugmentRecipe, *, seed: int, epoch: int, ids: Ints) -> Bools:
    """Draw which samples are flipped horizontally, bool [n]."""
    return rng.uniform(Stream.FLIP, seed, epoch, ids) < recipe.flip


def mix_params(recipe: AugmentRecipe, *, seed: int, step: int, lanes: Ints) -> MixParams:
    """Draw the mixing parameters of rows of a global batch.

    Mixup or CutMix, the weight and the box are drawn once per (step, lane), so they do not depend on the world size or
    the micro-batch size. The weight of CutMix is corrected to the area of the box after clipping.

    Args:
        recipe: the augmentation recipe.
        seed: seed of the run.
        step: step of the training, counted over all epochs.
        lanes: int64 [n]: lane of each row; the rows must be complete pairs.
    """
    return mix_params_of_steps(recipe, seed=seed, steps=range(step, step + 1), lanes=lanes)[0]


def mix_params_of_steps(recipe: AugmentRecipe, *, seed: int, steps: range, lanes: Ints) -> list[MixParams]:
    """Draw `mix_params` for several consecutive steps together, which is faster.

    For the few lanes of one step, the overhead of the NumPy calls exceeds the arithmetic.
    """
    lane, row = np.unique(lanes, return_inverse=True)
    count = len(lane)
    step = np.repeat(np.arange(steps.start, steps.stop), count)
    lane = np.tile(lane, len(steps))
    has_cutmix = recipe.cutmix > 0
    probability = recipe.mix_switch if has_cutmix and recipe.mixup > 0 else float(has_cutmix)
    use_cutmix: Bools = np.less(rng.uniform(Stream.MIX, seed, step, lane, 0), probability)
    lam = np.ones(len(lane))
    for alpha, chosen in ((recipe.mixup, ~use_cutmix), (recipe.cutmix, use_cutmix)):
        if alpha > 0:
            lam[chosen] = rng.beta(alpha, Stream.MIX, seed, step[chosen], lane[chosen], 3)
    center = np.stack([rng.integers(recipe.size, Stream.MIX, seed, step, lane, word) for word in (1, 2)], axis=1)
    box, kept = cutmix_box(lam, center, recipe.size)
    box = np.where(use_cutmix[:, None], box, 0).astype(np.int32)
    lam = np.where(use_cutmix, kept, lam)
    all_steps = MixParams(lam=lam.astype(np.float32), box=box, use_cutmix=use_cutmix)
    return [all_steps.take(row + number * count) for number in range(len(steps))]


def cutmix_box(lam: Floats, center: Ints, size: int) -> tuple[Boxes, Floats]:
    """Compute the box of CutMix, clipped to the image, and the weight that results from its area.

    Args:
        lam: float64 [n]: drawn weight, the fraction of the image outside the box before clipping.
        center: int64 [n, 2]: y and x of the box's center, in pixels.
        size: side of the image in pixels.

    Returns:
        int32 [n, 4]: y, x, height, width of the clipped box; float64 [n]: the fraction of the image outside it.
    """
    side = (size * np.sqrt(1.0 - lam)).astype(np.int64)[:, None]
    start = center - side // 2
    low, high = np.maximum(start, 0), np.minimum(start + side, size)
    box = np.concatenate([low, high - low], axis=1).astype(np.int32)
    return box, 1.0 - box[:, 2] * box[:, 3] / (size * size)


def _rand_augment(recipe: AugmentRecipe, seed: int, epoch: int, ids: Ints) -> tuple[Ints, Bools, Floats, Floats]:
    """Draw RandAugment operations, whether each is applied, their magnitudes and their arguments, [n, K] each."""
    policy = recipe.policy
    if policy is None:
        none = np.zeros((len(ids), 0))
        return none.astype(np.int64), none.astype(np.bool_), none, none
    key = (Stream.RAND_AUGMENT, seed, epoch, ids[:, None], np.arange(policy.layers))
    ops = rng.integers(len(OPS), *key, 0)
    applied = rng.uniform(*key, 1) < policy.probability
    if policy.std > 100:
        magnitude = rng.uniform(*key, 2) * policy.magnitude
    else:
        magnitude = np.clip(policy.magnitude + policy.std * rng.normal(*key, 2), 0.0, MAX_MAGNITUDE)
    sign = np.where(rng.uniform(*key, 3) < 0.5, -1.0, 1.0)
    return ops, applied, magnitude, arguments(ops, magnitude, sign, increasing=policy.increasing)


def _erase_boxes(recipe: AugmentRecipe, seed: int, epoch: int, ids: Ints) -> Boxes:
    """Draw one erased box per sample, smaller than the sample. All 0: nothing is erased, or no attempt fits."""
    all_boxes = np.zeros((len(ids), 4), np.int32)
    if recipe.erase == 0:
        return all_boxes
    erased: Bools = np.less(rng.uniform(Stream.ERASE, seed, epoch, ids, TRIES, 0), recipe.erase)
    ids = ids[erased]
    draw_area, draw_aspect = _tries(Stream.ERASE, seed, epoch, ids)
    area = _between(ERASE_AREA, draw_area) * (recipe.size * recipe.size)
    aspect = rng.exp(_between(_log(ERASE_ASPECT), draw_aspect))
    h, w = _rounded_root(area * aspect), _rounded_root(area / aspect)
    fits = (w > 0) & (h > 0) & (w < recipe.size) & (h < recipe.size)
    boxes = _placed((Stream.ERASE, seed, epoch, ids), (h, w), (recipe.size, recipe.size), fits)
    all_boxes[erased] = np.where(fits.any(axis=1, keepdims=True), boxes, 0)
    return all_boxes


def _tries(stream: Stream, seed: int, epoch: int, ids: Ints) -> Floats:
    """Draw uniform values [2, n, TRIES]: the area and the aspect ratio of each attempt."""
    return rng.uniform(stream, seed, epoch, ids[:, None], np.arange(TRIES), np.arange(2)[:, None, None])


def _placed(
    key: tuple[Stream, int, int, Ints], sides: tuple[Floats, Floats], room: tuple[Ints | int, Ints | int], fits: Bools
) -> Boxes:
    """Place the first drawn box that fits at a uniformly drawn position; int32 [n, 4].

    Args:
        key: key of the draws, to which the number of the attempt and 2 (for y) or 3 (for x) are appended.
        sides: heights and widths of the drawn boxes, [n, TRIES] each.
        room: heights and widths of the images.
        fits: bool [n, TRIES]: whether the box fits into the image.
    """
    rows, first = np.arange(len(fits)), fits.argmax(axis=1)
    h, w = (side[rows, first] for side in sides)
    height, width = room
    down, right = rng.uniform(*key, first, np.arange(2, 4)[:, None])
    # If no box fits, the caller replaces the result; the maximum only keeps the range of the draw positive.
    y, x = down * np.maximum(height - h + 1, 1), right * np.maximum(width - w + 1, 1)
    return np.stack([y, x, h, w], axis=1).astype(np.int32)


def _centered(height: Ints, width: Ints, h: Floats, w: Floats) -> Boxes:
    return np.stack([(height - h) // 2, (width - w) // 2, h, w], axis=1).astype(np.int32)


def _between(ends: tuple[float, float], u: Floats) -> Floats:
    return ends[0] + (ends[1] - ends[0]) * u


def _log(ends: tuple[float, float]) -> tuple[float, float]:
    return _log_of(ends[0]), _log_of(ends[1])


@functools.cache
def _log_of(value: float) -> float:
    return float(rng.log(value))


def _rounded_root(area: Floats) -> Floats:
    return np.rint(np.sqrt(area))

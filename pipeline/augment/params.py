"""Every random choice of augmentation, as arrays: pure functions of (seed, epoch, id), or of (seed, step, lane).

Nothing here touches a pixel or knows torch. All loaders use these numbers, so all of them make the same samples.
"""

from __future__ import annotations

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

TRIES = 10  # of a crop or an erasing box, before giving up
CENTRE_SHARE = 224 / 256  # of the short side: evaluation's resize to 256 and crop of 224
ERASE_AREA = (0.02, 1 / 3)
ERASE_ASPECT = (0.3, 1 / 0.3)  # height over width


@dataclass(frozen=True, kw_only=True)
class SampleParams:
    """What happens to each of n samples; L = the policy's layers, 0 without RandAugment."""

    ids: Ints
    """int64 [n]: the samples."""
    windows: Boxes
    """int32 [n, 4]: y, x, height, width of the crop, in source pixels."""
    flips: Bools
    """bool [n]: flipped horizontally after the crop."""
    ops: NDArray[np.int64]
    """int64 [n, L]: RandAugment's operations, values of `ops.Op`, applied in this order."""
    applied: Bools
    """bool [n, L]: whether each is applied at all."""
    magnitudes: Floats
    """float64 [n, L]: of 0..10."""
    arguments: Floats
    """float64 [n, L]: the magnitude and its sign in the operation's own unit, see `ops.arguments`."""
    erase_boxes: Boxes
    """int32 [n, 4]: y, x, height, width of the erased box in the sample; all 0: none."""
    erase_keys: NDArray[np.uint64]
    """uint64 [n]: the noise in the box is a function of this key and the place in the box."""

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: slice | Ints) -> SampleParams:
        """The parameters of some of the samples, for instance a micro-batch's."""
        return SampleParams(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


@dataclass(frozen=True, kw_only=True)
class MixParams:
    """How each of n rows is mixed with the other of its pair (2i, 2i+1)."""

    lam: NDArray[np.float32]
    """float32 [n]: the share that a row keeps of itself; 1: not mixed."""
    box: Boxes
    """int32 [n, 4]: y, x, height, width of what CutMix pastes from the partner; all 0 under mixup."""
    use_cutmix: Bools
    """bool [n]."""

    def take(self, rows: slice | Ints) -> MixParams:
        """The parameters of some of the rows: whole pairs."""
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
    """All choices for the samples `ids` (int64 [n]) of sources `heights` x `widths` pixels (integers [n])."""
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
    """Crop windows (y, x, height, width) in source pixels, int32 [n, 4].

    The random resized crop of Inception, as torchvision and timm define it: ten tries at an area and an aspect ratio,
    the first that fits placed at random; if none does, the largest centred window of permitted ratio.
    """
    height, width = np.asarray(heights, dtype=np.int64), np.asarray(widths, dtype=np.int64)
    if recipe.crop == "centre":
        side = np.maximum(np.rint(np.minimum(height, width) * CENTRE_SHARE), 1)
        return _centred(height, width, side, side)
    draw_area, draw_aspect = _tries(Stream.CROP, seed, epoch, ids)
    area = _between(recipe.scale, draw_area) * (height * width)[:, None]
    aspect = rng.exp(_between(_log(recipe.ratio), draw_aspect))
    w, h = _rounded_root(area * aspect), _rounded_root(area / aspect)
    fits = (w > 0) & (h > 0) & (w <= width[:, None]) & (h <= height[:, None])
    windows = _placed((Stream.CROP, seed, epoch, ids), (h, w), (height, width), fits)
    low, high = recipe.ratio
    fallback = _centred(
        height, width, np.clip(np.rint(width / low), 1, height), np.clip(np.rint(height * high), 1, width)
    )
    return np.where(fits.any(axis=1, keepdims=True), windows, fallback)


def flips(recipe: AugmentRecipe, *, seed: int, epoch: int, ids: Ints) -> Bools:
    """Which samples are flipped horizontally, bool [n]."""
    return rng.uniform(Stream.FLIP, seed, epoch, ids) < recipe.flip


def mix_params(recipe: AugmentRecipe, *, seed: int, step: int, lanes: Ints) -> MixParams:
    """Mixup and CutMix of a global batch's rows, or of any whole pairs of them.

    Choice, share and box are drawn once per (step, lane), so a row's fate depends neither on the world size nor on the
    micro-batch. CutMix's share is corrected to the area of the box after clipping.

    Args:
        step: the run's step, counted over all epochs.
        lanes: int64 [n], the lane of each row.
    """
    return mix_params_of_steps(recipe, seed=seed, steps=range(step, step + 1), lanes=lanes)[0]


def mix_params_of_steps(recipe: AugmentRecipe, *, seed: int, steps: range, lanes: Ints) -> list[MixParams]:
    """`mix_params` for each of several consecutive steps, drawn at once: numpy's calls cost more than their arithmetic
    for one step's few lanes."""
    lane, row = np.unique(lanes, return_inverse=True)
    count = len(lane)
    step = np.repeat(np.arange(steps.start, steps.stop), count)
    lane = np.tile(lane, len(steps))
    cut = recipe.cutmix > 0
    share = recipe.mix_switch if cut and recipe.mixup > 0 else float(cut)
    use_cutmix: Bools = np.less(rng.uniform(Stream.MIX, seed, step, lane, 0), share)
    lam = np.ones(len(lane))
    for alpha, chosen in ((recipe.mixup, ~use_cutmix), (recipe.cutmix, use_cutmix)):
        if alpha > 0:
            lam[chosen] = rng.beta(alpha, Stream.MIX, seed, step[chosen], lane[chosen], 3)
    centre = np.stack([rng.integers(recipe.size, Stream.MIX, seed, step, lane, word) for word in (1, 2)], axis=1)
    box, kept = cutmix_box(lam, centre, recipe.size)
    box = np.where(use_cutmix[:, None], box, 0).astype(np.int32)
    lam = np.where(use_cutmix, kept, lam)
    every = MixParams(lam=lam.astype(np.float32), box=box, use_cutmix=use_cutmix)
    return [every.take(row + number * count) for number in range(len(steps))]


def cutmix_box(lam: Floats, centre: Ints, size: int) -> tuple[Boxes, Floats]:
    """The box that CutMix pastes, and the share that is then kept.

    Args:
        lam: float64 [n], the share to keep.
        centre: int64 [n, 2], y and x of the box's centre.

    Returns:
        int32 [n, 4]: y, x, height and width, clipped to the image; float64 [n]: the share outside of it.
    """
    side = (size * np.sqrt(1.0 - lam)).astype(np.int64)[:, None]
    start = centre - side // 2
    low, high = np.maximum(start, 0), np.minimum(start + side, size)
    box = np.concatenate([low, high - low], axis=1).astype(np.int32)
    return box, 1.0 - box[:, 2] * box[:, 3] / (size * size)


def _rand_augment(recipe: AugmentRecipe, seed: int, epoch: int, ids: Ints) -> tuple[Ints, Bools, Floats, Floats]:
    """Operations, whether applied, magnitudes, arguments: [n, L] each."""
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
    """One box each, smaller than the sample; all 0 where the draw says no or ten tries fail."""
    all_boxes = np.zeros((len(ids), 4), np.int32)
    wanted: Bools = np.less(rng.uniform(Stream.ERASE, seed, epoch, ids, TRIES, 0), recipe.erase)
    ids = ids[wanted]
    draw_area, draw_aspect = _tries(Stream.ERASE, seed, epoch, ids)
    area = _between(ERASE_AREA, draw_area) * (recipe.size * recipe.size)
    aspect = rng.exp(_between(_log(ERASE_ASPECT), draw_aspect))
    h, w = _rounded_root(area * aspect), _rounded_root(area / aspect)
    fits = (w > 0) & (h > 0) & (w < recipe.size) & (h < recipe.size)
    boxes = _placed((Stream.ERASE, seed, epoch, ids), (h, w), (recipe.size, recipe.size), fits)
    all_boxes[wanted] = np.where(fits.any(axis=1, keepdims=True), boxes, 0)
    return all_boxes


def _tries(stream: Stream, seed: int, epoch: int, ids: Ints) -> Floats:
    """Uniform [2, n, TRIES]: area and aspect of each try."""
    return rng.uniform(stream, seed, epoch, ids[:, None], np.arange(TRIES), np.arange(2)[:, None, None])


def _placed(
    key: tuple[Stream, int, int, Ints], sides: tuple[Floats, Floats], room: tuple[Ints | int, Ints | int], fits: Bools
) -> Boxes:
    """The first try that fits, put at a uniformly drawn place in the room; int32 [n, 4].

    Args:
        key: of the tries, which go on with their number and a word: 2 for y, 3 for x.
    """
    rows, first = np.arange(len(fits)), fits.argmax(axis=1)
    h, w = (side[rows, first] for side in sides)
    height, width = room
    down, right = rng.uniform(*key, first, np.arange(2, 4)[:, None])
    # An unfit first try gives nonsense here, which the caller replaces; the clip keeps it in range.
    y, x = down * np.maximum(height - h + 1, 1), right * np.maximum(width - w + 1, 1)
    return np.stack([y, x, h, w], axis=1).astype(np.int32)


def _centred(height: Ints, width: Ints, h: Floats, w: Floats) -> Boxes:
    return np.stack([(height - h) // 2, (width - w) // 2, h, w], axis=1).astype(np.int32)


def _between(ends: tuple[float, float], u: Floats) -> Floats:
    return ends[0] + (ends[1] - ends[0]) * u


def _log(ends: tuple[float, float]) -> tuple[float, float]:
    return float(rng.log(ends[0])), float(rng.log(ends[1]))


def _rounded_root(area: Floats) -> Floats:
    return np.rint(np.sqrt(area))

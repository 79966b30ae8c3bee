"""Which samples the memory cache keeps, at which size, and where: functions of the index, the budget and the seed.

An epoch reads every sample once, in a new order. A cache that keeps the most recently used samples would therefore
evict most samples before they are used again. This cache keeps a fixed subset, so its hit rate from the second epoch on
is the share of the samples that it keeps. The subset is a function of the sample ids, so every process computes the
same one.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline import rng
from pipeline.plan import Ids
from pipeline.rng import Stream
from shards.errors import UserError
from shards.format.index import Index
from shards.memory import GIB

NOT_KEPT = -1


@dataclass(frozen=True)
class CacheLayout:
    """The samples that the cache keeps. All arrays are [samples of the split]."""

    heights: NDArray[np.int64]
    widths: NDArray[np.int64]
    """Sizes of the images in pixels, as the cache stores them."""
    offsets: NDArray[np.int64]
    """Offset in bytes of the image's pixels; `NOT_KEPT` if the cache does not keep it."""
    size: int
    """Size of the cache in bytes. It begins with one byte per sample (see `SharedPixels`)."""

    @classmethod
    def of(cls, index: Index, *, budget: int, short_side: int | None, seed: int) -> CacheLayout:
        """Choose samples in the order of a hash of their ids until they fill the budget.

        Args:
            index: index of the split.
            budget: size of the cache in bytes.
            short_side: images whose short side is longer are stored with this short side, in pixels. None: as they are.
            seed: seed of the run.

        Raises:
            UserError: the budget is too small for a single image.
        """
        heights, widths = stored_sizes(index["height"], index["width"], short_side)
        start = -(-len(index) // mmap.PAGESIZE) * mmap.PAGESIZE
        bytes_of = 3 * heights * widths
        order = np.argsort(rng.bits(Stream.MEMORY_CACHE, seed, np.arange(len(index))), kind="stable")
        kept = order[start + np.cumsum(bytes_of[order]) <= budget]
        if not len(kept):
            raise UserError(
                f"--memory-cache {budget / GIB:g}: too small for one image, which needs "
                f"{(start + bytes_of[order[0]]) / GIB:.2g} GiB; use a larger cache, or --memory-cache 0"
            )
        kept.sort()
        ends = start + np.cumsum(bytes_of[kept])
        offsets = np.full(len(index), NOT_KEPT)
        offsets[kept] = ends - bytes_of[kept]
        return cls(heights, widths, offsets, int(ends[-1]))

    def keeps(self, ids: Ids) -> NDArray[np.bool_]:
        """Return which samples the cache keeps, bool [n]."""
        kept: NDArray[np.bool_] = self.offsets[ids] != NOT_KEPT
        return kept

    @property
    def kept(self) -> int:
        """Number of samples that the cache keeps."""
        return int((self.offsets != NOT_KEPT).sum())

    def describe(self, short_side: int | None) -> str:
        """Return size and number of images, for messages."""
        kept = f"{self.kept:,} of {len(self.offsets):,} images ({self.kept / len(self.offsets):.1%})"
        side = "" if short_side is None else f", short side at most {short_side}"
        return f"{self.size / GIB:.3g} GiB per node: {kept}{side}"

    @property
    def keeps_all(self) -> bool:
        """Whether the cache keeps all samples of the split."""
        return self.kept == len(self.offsets)


def stored_sizes(
    heights: NDArray[np.integer], widths: NDArray[np.integer], short_side: int | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Compute the sizes of images after shrinking their short side to at most `short_side` pixels, int64 [n] each.

    The long side is rounded to the nearest whole number, half up.
    """
    height, width = heights.astype(np.int64), widths.astype(np.int64)
    if short_side is None:
        return height, width
    short = np.minimum(height, width)
    shrunk = np.minimum(short, short_side)
    return _scaled(height, short, shrunk), _scaled(width, short, shrunk)


def scaled_windows(
    windows: NDArray[np.int32], sides: NDArray[np.int64], stored: NDArray[np.int64]
) -> NDArray[np.int32]:
    """Convert crop windows of the original images to windows of the stored images, int32 [n, 4].

    Each border is rounded to the nearest whole pixel, half up. A window has at least one pixel.

    Args:
        windows: int32 [n, 4]: y, x, height, width in pixels of the original images.
        sides: int64 [n, 2]: height, width of the original images.
        stored: int64 [n, 2]: height, width of the stored images, at most `sides`.
    """
    start, extent = np.split(windows.astype(np.int64), 2, axis=1)
    low = np.minimum(_scaled(start, sides, stored), stored - 1)
    high = np.maximum(_scaled(start + extent, sides, stored), low + 1)
    return np.hstack([low, high - low]).astype(np.int32)


def _scaled(
    values: NDArray[np.int64], sides: NDArray[np.int64], stored: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return values * stored / sides, rounded half up, in integer arithmetic, so that all machines agree."""
    rounded: NDArray[np.int64] = (2 * values * stored + sides) // (2 * sides)
    return rounded

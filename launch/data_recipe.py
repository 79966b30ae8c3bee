"""What a run is fed, as a frozen dataclass with a docstring per field; a part of the recipe (launch/recipe.py)."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.augment.recipe import AugmentRecipe, augment_recipe
from pipeline.loader import CROP_PCT, LoaderOptions
from pipeline.plan import DEFAULT_WINDOW
from pipeline.remote import is_remote
from pipeline.remote_set import open_set
from shards.dataset import ShardSet
from shards.errors import UserError

DEFAULT_DATA = Path("imagenet-shards")


class RecipeError(UserError):
    """Options that contradict one another or make no sense."""


@dataclass(frozen=True, kw_only=True)
class DataRecipe:
    """What the run is fed."""

    data: str | None = None
    """Shard set made by 'pipeline shard': a folder, or a URL (s3://, https://, what fsspec knows). None = $FAT_DATA,
    else ./imagenet-shards."""
    cache: Path | None = None
    """Where a remote set is staged, once per node; on a local disk. None = $FAT_CACHE, else in the temporary folder."""
    cache_size: float | None = None
    """Room in the cache in GiB. None = four fifths of what is free there."""
    size: int = 224
    """Side of the images in pixels."""
    global_batch: int = 1024
    """Images per optimiser step over all ranks. Part of the run: it cannot change on resume."""
    micro_batch: int | None = None
    """Images per forward pass of a rank; gradients are accumulated over the rest. None = all of the rank's at once."""
    eval_batch: int | None = None
    """Images per rank and evaluation step. None = the rank's rows of a global batch, at most 256."""
    lanes: int | None = None
    """Contiguous streams that every batch is mixed from. None = the largest divisor of half the batch up to 64."""
    window: int = DEFAULT_WINDOW
    """Samples among which each stream shuffles."""
    augment: Literal["fat", "light", "none"] = "fat"
    """Augmentation: the paper's, crop and flip only, or a fixed centre crop. The fields below override parts of it."""
    crop_scale: tuple[float, float] | None = None
    """Area of the random crop, as shares of the image."""
    crop_pct: float = CROP_PCT
    """Share of the short side that evaluation looks at: the centre crop after resizing to size / crop_pct."""
    flip: float | None = None
    """Probability of a horizontal flip."""
    rand_augment: str | None = None
    """RandAugment in timm's syntax, such as rand-m9-mstd0.5-inc1; '' = off."""
    erase: float | None = None
    """Probability of random erasing."""
    mixup: float | None = None
    """Mixup's alpha; 0 = off."""
    cutmix: float | None = None
    """Cutmix's alpha; 0 = off."""
    loader: LoaderOptions = field(default_factory=LoaderOptions)

    def __post_init__(self) -> None:
        for name in ("size", "global_batch", "window"):
            if getattr(self, name) < 1:
                raise RecipeError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least 1")
        if self.eval_batch is not None and self.eval_batch < 1:
            raise RecipeError(f"--eval-batch {self.eval_batch}: at least 1")
        if not 0 < self.crop_pct <= 1:
            raise RecipeError(f"--crop-pct {self.crop_pct}: between 0 and 1; the paper's is {CROP_PCT}")

    def augmentation(self) -> AugmentRecipe:
        """The augmentation recipe that the fields amount to."""
        overrides: dict[str, Any] = {
            "scale": self.crop_scale,
            "flip": self.flip,
            "erase": self.erase,
            "mixup": self.mixup,
            "cutmix": self.cutmix,
        }
        overrides = {name: value for name, value in overrides.items() if value is not None}
        if self.rand_augment is not None:
            overrides["rand_augment"] = self.rand_augment or None
        return augment_recipe(self.augment, size=self.size, **overrides)

    def open(self) -> ShardSet:
        """Open the shard set, which may be on a server.

        Raises:
            UserError: no such set, or a cache that cannot be used.
        """
        return open_set(self.location(), cache=self.cache, cache_gib=self.cache_size)

    def location(self) -> Path | str:
        """The shard set's folder or URL: `data`, else $FAT_DATA, else ./imagenet-shards.

        Raises:
            RecipeError: none was named and the defaults do not exist.
        """
        named = self.data or os.environ.get("FAT_DATA")
        if named:
            return named if is_remote(named) else Path(named)
        if DEFAULT_DATA.exists():
            return DEFAULT_DATA
        raise RecipeError(
            f"no data: give --data SET, set FAT_DATA, or make ./{DEFAULT_DATA} with 'pipeline shard imagenet/' "
            f"(neither FAT_DATA nor ./{DEFAULT_DATA} exists)"
        )

"""What a run is fed: the shard set, the order of samples and their augmentation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Interval

from launch.config.errors import RecipeError
from pipeline.augment.recipe import Alpha, AugmentRecipe, CropArea, augment_recipe
from pipeline.loader import CROP_PCT, LoaderOptions
from pipeline.plan import DEFAULT_SHUFFLE_BLOCK_SIZE
from pipeline.storage.remote.shard_set import open_set
from pipeline.storage.remote.url import check_url, is_remote
from shards.format.dataset import ShardSet
from shards.format.manifest_digest import ManifestDigest, split_digest
from shards.option_help import default
from shards.ranges import Batch, Fraction, check_ranges

DEFAULT_DATA = Path("imagenet-shards")
# FAT reduces images by 32.
ModelSide = Annotated[int, Interval(ge=32, le=8192)]
# The image is resized to size / crop_pct first: a small share of a large image is a huge one.
CropPct = Annotated[float, Interval(ge=0.1, le=1)]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What the run is fed."""

    data: Annotated[str | None, default("$FAT_DATA, else ./imagenet-shards")] = None
    """Shard set made by 'pipeline shard': a folder, or a URL (s3://, https://, what fsspec knows)."""
    set_digest: Annotated[str | None, default("not checked")] = None
    """xxh3=HEX or sha256=HEX that the set's dataset.json must have (printed by 'pipeline info'); the same as #xxh3=HEX
    behind the set's location."""
    cache: Annotated[Path | None, default("$FAT_CACHE, else the temporary folder")] = None
    """Folder on a local disk in which a remote set is staged, once per node, in a subfolder of the cache's own."""
    cache_size: Annotated[
        Annotated[float, Interval(gt=0, le=10**9)] | None, default("four fifths of what is free there")
    ] = None
    """Room in the cache in GiB."""
    cache_shared: bool = False
    """All users in the group of the cache's folder use one cache, instead of one each."""
    size: ModelSide = 224
    """Side of the images in pixels."""
    global_batch: Batch = 1024
    """Images per optimiser step over all ranks. Part of the run: it cannot change on resume."""
    micro_batch: Annotated[Batch | None, default("all of the rank's images at once")] = None
    """Images per forward pass of a rank; gradients are accumulated over the rest."""
    eval_batch: Annotated[Batch | None, default("the rank's rows of a global batch, at most 256")] = None
    """Images per rank and evaluation step."""
    lanes: Annotated[Batch | None, default("the largest divisor of half the batch up to 64")] = None
    """Contiguous streams that every batch interleaves."""
    shuffle_block_size: Annotated[int, Interval(ge=1, le=10**9)] = DEFAULT_SHUFFLE_BLOCK_SIZE
    """Samples among which each lane shuffles."""
    augment: Literal["fat", "light", "none"] = "fat"
    """Augmentation: the paper's, crop and flip only, or a fixed centre crop. The fields below override parts of it."""
    crop_scale: Annotated[tuple[CropArea, CropArea] | None, default("that of --augment")] = None
    """Area of the random crop, as shares of the image."""
    crop_pct: CropPct = CROP_PCT
    """Fraction of the short side that evaluation looks at: the centre crop after resizing to size / crop_pct."""
    flip: Annotated[Fraction | None, default("that of --augment")] = None
    """Probability of a horizontal flip."""
    rand_augment: Annotated[str | None, default("that of --augment")] = None
    """RandAugment in timm's syntax, such as rand-m9-mstd0.5-inc1; '' = off."""
    erase: Annotated[Fraction | None, default("that of --augment")] = None
    """Probability of random erasing."""
    mixup: Annotated[Alpha | None, default("that of --augment")] = None
    """Mixup's alpha; 0 = off."""
    cutmix: Annotated[Alpha | None, default("that of --augment")] = None
    """Cutmix's alpha; 0 = off."""
    loader: LoaderOptions = field(default_factory=LoaderOptions)

    def __post_init__(self) -> None:
        check_ranges(self)
        self.augmentation()  # the laws between its parts
        # Before anything of the recipe is saved or shown.
        location, _ = split_digest(self.data or "", self.set_digest)
        if is_remote(location):
            check_url(location)

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

    def with_environment(self, environment: Mapping[str, str]) -> DataConfig:
        """Fill `data` and `cache` from FAT_DATA and FAT_CACHE where they are None; for command lines."""
        data, cache = environment.get("FAT_DATA"), environment.get("FAT_CACHE")
        return replace(self, data=self.data or data or None, cache=self.cache or (Path(cache) if cache else None))

    def open(self, *, local_ranks: int = 1) -> ShardSet:
        """Open the shard set, which may be on a server.

        Args:
            local_ranks: ranks of this machine, which share the cache of a remote set.

        Raises:
            UserError: no such set, another one than `set_digest` says, or a cache that cannot be used.
        """
        location, pin = self._located()
        return open_set(
            location,
            cache=self.cache,
            cache_gib=self.cache_size,
            cache_shared=self.cache_shared,
            digest=str(pin) if pin else None,
            local_ranks=local_ranks,
        )

    def location(self) -> Path | str:
        """The shard set's folder or URL, without a digest behind it: `data`, else ./imagenet-shards.

        Raises:
            RecipeError: none was named and the default does not exist.
        """
        return self._located()[0]

    def _located(self) -> tuple[Path | str, ManifestDigest | None]:
        data = self.data or (DEFAULT_DATA if DEFAULT_DATA.exists() else None)
        if data is None:
            raise RecipeError(
                f"no data: give --data SET, set FAT_DATA, or make ./{DEFAULT_DATA} with 'pipeline shard imagenet/' "
                f"(neither FAT_DATA nor ./{DEFAULT_DATA} exists)"
            )
        location, pin = split_digest(data, self.set_digest)
        return location if is_remote(location) else Path(location), pin

"""Options of the data: the shard set, batch sizes, the order of samples and their augmentation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Interval

from launch.config.errors import RecipeError
from pipeline.augment.recipe import Alpha, AugmentRecipe, CropArea, augment_recipe
from pipeline.loader import CROP_PCT, LoaderOptions
from pipeline.phases.size_schedule import SizeSchedule, parse_micro_batches
from pipeline.phases.train_phase import DEFAULT_MIN_STRENGTH
from pipeline.plan import DEFAULT_SHUFFLE_BLOCK_SIZE
from pipeline.sampling.selection import parse_classes, select
from pipeline.storage.remote.shard_set import open_set
from pipeline.storage.remote.url import check_url, is_remote
from shards.format.dataset import ShardSet
from shards.format.manifest_digest import ManifestDigest, split_digest
from shards.option_help import default
from shards.ranges import Batch, CropPct, Fraction, ModelSide, check_ranges

DEFAULT_DATA = Path("imagenet-shards")
ChannelMean = Annotated[float, Interval(ge=0, le=1)]
# A tiny standard deviation would make the normalized values, and their float32 rounding errors, huge.
ChannelStd = Annotated[float, Interval(ge=1e-3, le=1)]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Shard set, batch sizes, order of samples and augmentation."""

    data: Annotated[str | None, default("$FAT_DATA, else ./imagenet-shards")] = None
    """Shard set written by 'pipeline shard': a folder, or a URL (s3://, https://, or another scheme that fsspec
    supports)."""
    set_digest: Annotated[str | None, default("not checked")] = None
    """Expected digest of the set's dataset.json, as xxh3=HEX or sha256=HEX ('pipeline info' prints it). Training does
    not start if the digest differs. Appending #xxh3=HEX to --data has the same effect."""
    cache: Annotated[Path | None, default("$FAT_CACHE, else the temporary folder")] = None
    """Folder on a local disk in which the shards of a remote set are staged, once per node. Only a subfolder that is
    created in it is used."""
    cache_size: Annotated[
        Annotated[float, Interval(gt=0, le=10**9)] | None, default("80 % of the free space of the cache's disk")
    ] = None
    """Maximum size of the cache in GiB, for all shard sets together. When it is full, the least recently used shards
    are evicted, and downloaded again when they are needed."""
    cache_shared: bool = False
    """Use one cache for all users in the group of the cache folder, instead of one cache per user."""
    classes_subset: Annotated[str | None, default("all classes")] = None
    """Train and evaluate on some of the classes, for quick trials: their folder names or names, separated by commas;
    @FILE with one name per line; or a number N, the first N classes of the set. Labels are renumbered in the order of
    the set. It cannot change when a run is resumed."""
    fraction: Annotated[float, Interval(gt=0, le=1)] = 1.0
    """Train on this fraction of the images of each class, for quick trials; at least one image per class. --seed
    chooses them, the same ones in every epoch. The validation split stays complete, so accuracies can be compared with
    those of other runs. It cannot change when a run is resumed."""
    class_balance: Fraction = 0.0
    """0 = train on each image once per epoch. 1 = draw all classes equally often. Between: draw a class of n images in
    proportion to n^(1 - B), so 0.5 is square-root sampling (arXiv 1910.09217). An epoch has as many images as without
    it; images of small classes are repeated, with other augmentations. It cannot change when a run is resumed."""
    size: ModelSide = 224
    """Height and width of the model's input images in pixels, in training and evaluation. With --size-schedule, that of
    the last training images."""
    size_schedule: Annotated[str | None, default("all images have --size")] = None
    """Progressive resizing: points POSITION:SIZE, such as 0:128,65:192,85:224. A position is a percentage of the
    training, or a number of epochs (16e). Between two points the size is interpolated, in multiples of 32; write a size
    twice to hold it (0:128,50:128,50:224). The last size must be --size. It cannot change when a run is resumed."""
    min_strength: Fraction = DEFAULT_MIN_STRENGTH
    """With --size-schedule: factor of RandAugment's magnitude and of --drop-path at the smallest size. It rises
    linearly with the size to 1 at the largest, as in EfficientNetV2 (arXiv 2104.00298); magnitudes are rounded. It
    cannot change when a run is resumed."""
    eval_size: Annotated[ModelSide | None, default("--size")] = None
    """Height and width of images in evaluations. A model is often more accurate with images that are somewhat larger
    than those of its training (FixRes, arXiv 1906.06423)."""
    global_batch: Batch = 1024
    """Images per optimizer step, over all ranks. The default learning rates are proportional to it. It cannot change
    when a run is resumed."""
    micro_batch: Annotated[Batch | None, default("all images of the rank in one forward pass")] = None
    """Images per forward pass of a rank. A smaller number needs less memory; gradients are accumulated over the
    micro-batches of a step."""
    micro_batch_schedule: Annotated[str | None, default("--micro-batch at every size")] = None
    """Images per forward pass of a rank at some sizes of --size-schedule, such as 128:256,192:128: smaller images leave
    memory for more of them. The global batch stays the same."""
    eval_batch: Annotated[Batch | None, default("the images of the rank in a global batch, at most 256")] = None
    """Images per rank and evaluation step. Use a smaller number if evaluation runs out of memory."""
    lanes: Annotated[Batch | None, default("the largest divisor of half the global batch, up to 64")] = None
    """Number of lanes, the contiguous streams of samples that every batch interleaves. It must divide the global batch.
    More lanes mix samples better, and read from more shards at a time. It cannot change when a run is resumed."""
    shuffle_block_size: Annotated[int, Interval(ge=1, le=10**9)] = DEFAULT_SHUFFLE_BLOCK_SIZE
    """Samples in a shuffle block, within which each lane shuffles. Use a larger number for sets whose shards are not
    shuffled; reads are then less sequential. It cannot change when a run is resumed."""
    augment: Literal["fat", "light", "none"] = "fat"
    """Augmentation preset. fat = the paper's; light = random crop and horizontal flip only; none = a fixed center crop.
    The options below override parts of it."""
    crop_scale: Annotated[tuple[CropArea, CropArea] | None, default("that of --augment")] = None
    """Smallest and largest area of the random crop, as fractions of the image's area."""
    crop_pct: CropPct = CROP_PCT
    """Fraction of the short side that evaluation's center crop keeps: the image is resized to the size of evaluation /
    crop_pct, and cropped to this size."""
    flip: Annotated[Fraction | None, default("that of --augment")] = None
    """Probability of a horizontal flip."""
    rand_augment: Annotated[str | None, default("that of --augment")] = None
    """RandAugment policy in timm's syntax, such as rand-m9-mstd0.5-inc1. An empty string turns RandAugment off."""
    erase: Annotated[Fraction | None, default("that of --augment")] = None
    """Probability of random erasing, per image."""
    mixup: Annotated[Alpha | None, default("that of --augment")] = None
    """Mixup alpha: images are mixed with a weight drawn from Beta(alpha, alpha). 0 turns mixup off."""
    cutmix: Annotated[Alpha | None, default("that of --augment")] = None
    """CutMix alpha: the area of the pasted box is drawn from Beta(alpha, alpha). 0 turns CutMix off."""
    mean: tuple[ChannelMean, ChannelMean, ChannelMean] = AugmentRecipe.mean
    """Mean of red, green and blue, from 0 to 1, that normalization subtracts, in training and evaluation. The default
    is that of ImageNet."""
    std: tuple[ChannelStd, ChannelStd, ChannelStd] = AugmentRecipe.std
    """Standard deviation of red, green and blue, for values from 0 to 1, by which normalization divides. The default is
    that of ImageNet."""
    loader: LoaderOptions = field(default_factory=LoaderOptions)

    def __post_init__(self) -> None:
        check_ranges(self)
        self.augmentation()  # raises an error if the augmentation options are invalid
        self._check_sizes()
        # A URL with credentials is rejected here, before any of the recipe is saved or printed.
        location, _ = split_digest(self.data or "", self.set_digest)
        if is_remote(location):
            check_url(location)

    def augmentation(self) -> AugmentRecipe:
        """Return the preset `augment` with the overriding options applied."""
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
        return augment_recipe(self.augment, size=self.size, mean=self.mean, std=self.std, **overrides)

    def _check_sizes(self) -> None:
        """Check that the options of progressive resizing do not contradict each other.

        Raises:
            UserError: a schedule is invalid, or does not end with `size`.
        """
        schedule = self.sizes
        if schedule is None and self.micro_batch_schedule is not None:
            raise RecipeError(
                f"--micro-batch-schedule {self.micro_batch_schedule}: requires --size-schedule; for one size, use "
                "--micro-batch"
            )
        if schedule is not None and schedule.last != self.size:
            raise RecipeError(
                f"--size-schedule {self.size_schedule}: ends with images of {schedule.last} pixels, but --size is "
                f"{self.size}; use --size {schedule.last}, or end the schedule with {self.size}"
            )
        _ = self.micro_batches  # raises an error if the schedule of micro-batches is invalid

    @property
    def sizes(self) -> SizeSchedule | None:
        """`size_schedule`, parsed."""
        return None if self.size_schedule is None else SizeSchedule.parse(self.size_schedule)

    @property
    def micro_batches(self) -> Mapping[int, int]:
        """`micro_batch_schedule`, parsed: images per forward pass, by size."""
        if self.sizes is None or self.micro_batch_schedule is None:
            return {}
        return parse_micro_batches(self.micro_batch_schedule, self.sizes)

    @property
    def evaluation_size(self) -> int:
        """`eval_size`, or its default."""
        return self.size if self.eval_size is None else self.eval_size

    @property
    def model_sizes(self) -> tuple[int, ...]:
        """Sizes of the schedule's points, the size of training and that of evaluation, in ascending order."""
        points = () if self.sizes is None else self.sizes.points
        return tuple(sorted({self.size, self.evaluation_size, *(point.size for point in points)}))

    def at_one_size(self) -> DataConfig:
        """Return these options without the schedules of progressive resizing, for measurements at `size`."""
        return replace(self, size_schedule=None, micro_batch_schedule=None)

    def with_environment(self, environment: Mapping[str, str]) -> DataConfig:
        """Return these options with `data` and `cache` from FAT_DATA and FAT_CACHE where they are None."""
        data, cache = environment.get("FAT_DATA"), environment.get("FAT_CACHE")
        return replace(self, data=self.data or data or None, cache=self.cache or (Path(cache) if cache else None))

    def open(self, *, local_ranks: int = 1, seed: int = 0) -> ShardSet:
        """Open the shard set, which may be on a server, and select classes and samples of it.

        Args:
            local_ranks: number of ranks on this machine; they share the cache of a remote set.
            seed: seed of the run, which chooses the samples of `fraction`.

        Raises:
            UserError: the set does not exist, does not match `set_digest`, has not the classes of `classes_subset`, or
                its cache cannot be used.
        """
        location, pin = self._located()
        dataset = open_set(
            location,
            cache=self.cache,
            cache_gib=self.cache_size,
            cache_shared=self.cache_shared,
            digest=str(pin) if pin else None,
            local_ranks=local_ranks,
        )
        return self.select_from(dataset, seed=seed)

    def select_from(self, dataset: ShardSet, *, seed: int) -> ShardSet:
        """Reduce a set, in place, to the classes and samples of these options; return it. See `open`."""
        classes = None if self.classes_subset is None else parse_classes(self.classes_subset)
        return select(dataset, classes=classes, fraction=self.fraction, seed=seed)

    def location(self) -> Path | str:
        """Return the shard set's folder or URL without its digest: `data`, else ./imagenet-shards.

        Raises:
            RecipeError: `data` is None and the default does not exist.
        """
        return self._located()[0]

    def _located(self) -> tuple[Path | str, ManifestDigest | None]:
        data = self.data or (DEFAULT_DATA if DEFAULT_DATA.exists() else None)
        if data is None:
            raise RecipeError(
                f"no data set: neither --data nor FAT_DATA is set, and ./{DEFAULT_DATA} does not exist; use --data "
                f"SET, or create ./{DEFAULT_DATA} with 'pipeline shard imagenet/'"
            )
        location, pin = split_digest(data, self.set_digest)
        return location if is_remote(location) else Path(location), pin

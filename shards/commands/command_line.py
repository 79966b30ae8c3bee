"""The subcommands shard, index and sample: options with their help; `run()` returns the exit status."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Interval
from tyro.conf import Positional, arg

from shards.convert.options import MAX_REJECTS, MIB, Format, Options
from shards.errors import UserError, explain_os_errors
from shards.files.output import check_output_folder
from shards.format.beton import BetonOptions, WriteMode
from shards.images.limits import MAX_SIDE
from shards.images.rules import Check, ImageRules
from shards.option_help import default
from shards.ranges import Fraction, Seed, check_ranges
from shards.redact import one_line
from shards.sources.scan import Layout, ScanOptions

MAX_SHARD_SIZE = 2**20
"""Maximum shard size in MiB (1 TiB), because readers download whole shards."""
MAX_SMART_RATIO = 1e6
MAX_PHOTOS = 2_000_000
"""Maximum number of photos: more images than ImageNet-1K has, about 220 GB in total."""
Side = Annotated[int, Interval(ge=1, le=MAX_SIDE)]
Workers = Annotated[int, Interval(ge=1, le=4096)]


@dataclass(frozen=True)
class Shard:
    """Convert a source of images into a shard set: shuffled WebDataset tars with an index and a manifest.

    If the conversion is interrupted, even by kill -9, run the same command again to resume it.
    """

    source: Positional[Annotated[Path, arg(metavar="SOURCE")]]
    """Images to convert, in one of these layouts (see --from):
    - folder: one folder per class, optionally inside train/, val/ and test/
    - ilsvrc: the ILSVRC2012 tars
    - class-tars: a folder with one tar per class
    - kaggle: Kaggle's ILSVRC/ folder
    - parquet: Parquet files, for example from Hugging Face
    - webdataset: WebDataset tars"""

    out: Annotated[Path | None, default("SOURCE-shards, next to the source")] = None
    """Folder to write the set to. It must be empty, not exist yet, or hold an unfinished conversion of SOURCE."""

    layout: Annotated[Layout | None, arg(name="from", help_behavior_hint="(default: detected)")] = None
    """Source layout."""

    val_fraction: float = ScanOptions.val_fraction
    """Fraction of each class (0 to 1) to split off for validation, if the source has no validation split."""

    classes: Annotated[Path | None, default("the order and names in the source")] = None
    """Text file that lists the classes in the order of their labels (0, 1, ...), one per line.
    A line is the class folder, optionally followed by a human-readable name."""

    shard_size: Annotated[int, Interval(ge=1, le=MAX_SHARD_SIZE)] = Options.shard_bytes // MIB
    """Approximate size of a shard in MiB, if its images are stored as they are in the source. Shards of images that are
    shrunk or stored as pixels have the same samples, and another size."""

    seed: Seed = ScanOptions.seed
    """Seed of the global shuffle and of the validation split."""

    check: Check = ImageRules.check
    """decode: decode every image once, and reject those that fail.
    header: only parse the image headers, which is faster, but damaged images are then found during training."""

    format: Format = Options.format
    """Files to write: WebDataset tars, FFCV .beton files, or both with the samples in the same order."""

    write_mode: Annotated[WriteMode | None, default("jpg; raw with --pixels")] = None
    """How a .beton file stores images: jpg (encoded), raw (decoded pixels) or smart.
    smart stores the pixels of an image if they need at most --smart-ratio times the bytes of its JPEG."""

    smart_ratio: Annotated[float, Interval(ge=1, le=MAX_SMART_RATIO)] = BetonOptions.smart_ratio
    """For --write-mode smart: maximum size of an image's pixels, as a multiple of its JPEG's size."""

    max_side: Annotated[Side | None, default("no limit")] = None
    """Maximum longer side in pixels. Larger images are shrunk to it and re-encoded."""

    short_side: Annotated[Side | None, default("no limit")] = None
    """Maximum shorter side in pixels. Larger images are shrunk to it and re-encoded."""

    quality: Annotated[int, Interval(ge=1, le=100)] = ImageRules.quality
    """JPEG quality (1 to 100) of images that are shrunk."""

    pixels: bool = False
    """Store pixels (uint8 RGB) instead of JPEGs: KEY.ppm in tars, and --write-mode raw in a .beton file.
    Training then needs no JPEG decoder, but the set is 5 to 6 times as large; with --short-side 256, 2 to 3 times.
    The command prints the expected size before it writes."""

    max_rejects: Fraction = MAX_REJECTS
    """Maximum fraction of images (0 to 1) that may be rejected, for example because they are damaged.
    The conversion fails if more are rejected."""

    strict: bool = False
    """Fail if the source probably contains a mistake, such as missing classes or blank images.
    By default, only a warning is printed."""

    workers: Annotated[Workers | None, default("one per available CPU core")] = None
    """Number of worker processes."""

    part: Annotated[str | None, default("all shards")] = None
    """K/N: write only the K-th of N parts of the shards, for array jobs. Run with --finish after all N parts."""

    finish: bool = False
    """Join the parts into the finished set, after all parts have run."""

    def run(self) -> int:
        from shards.convert.convert import convert, default_out, finish
        from shards.convert.parts import ConversionPart
        from shards.format.manifest import MANIFEST_NAME

        with explain_os_errors(self.source):
            out = self.out or default_out(self.source)
        options = self._options()
        if not (out / MANIFEST_NAME).exists():
            check_output_folder(out, "--out", "specify a folder that you can write to with --out")
        if self.finish:
            outcome = finish(out, self.max_rejects, self.workers, source=self.source, strict=self.strict)
        else:
            part = ConversionPart.parse(self.part) if self.part is not None else None
            outcome = convert(self.source, out, options, part)
            if outcome is None and part and not (out / MANIFEST_NAME).exists():
                _print(
                    f"{out}: part {part} is done; after all parts: pipeline shard {self.source} --out {out} --finish"
                )
                return 0
        if outcome is None:
            compared = f", and {self.source} is unchanged" if self.source.exists() else ""
            _print(f"{out}: already complete{compared}")
            return 0
        return _print_summary(out)

    def _options(self) -> Options:
        from shards.sources.naming.classes import check_fraction

        check_ranges(self)
        check_fraction(self.val_fraction)
        if self.finish and self.part is not None:
            raise UserError(f"--part {self.part} --finish: --finish joins all parts; omit one of the two options")
        if self.pixels and self.check == "header":
            raise UserError("--pixels --check header: pixels are decoded, which checks them; omit --check")
        if self.pixels and self.write_mode not in (None, "raw"):
            raise UserError(f"--pixels --write-mode {self.write_mode}: --pixels stores pixels only; omit --write-mode")
        return Options(
            scan=ScanOptions(
                layout=self.layout,
                val_fraction=self.val_fraction,
                classes=self.classes,
                seed=self.seed,
                workers=self.workers,
            ),
            shard_bytes=self.shard_size * MIB,
            rules=ImageRules(
                check=self.check,
                max_side=self.max_side,
                short_side=self.short_side,
                quality=self.quality,
                pixels=self.pixels,
            ),
            max_rejects=self.max_rejects,
            strict=self.strict,
            format=self.format,
            beton=BetonOptions(mode=self.write_mode or ("raw" if self.pixels else "jpg"), smart_ratio=self.smart_ratio),
        )


@dataclass(frozen=True)
class Index:
    """Turn existing WebDataset tars into a shard set in place: write an index and a manifest next to them.

    The tars are not copied, and their samples keep their order. If they are not shuffled, use 'pipeline shard' instead.
    """

    tars: Positional[Annotated[tuple[Path, ...], arg(metavar="TAR [TAR ...]", help_behavior_hint="(required)")]]
    """WebDataset tars of KEY.jpg (or KEY.ppm) and KEY.cls files, all in one folder.
    A tar belongs to the split (train, val or test) that is a word of its file name, otherwise to train."""

    classes: Annotated[Path | None, default("the labels in the tars")] = None
    """Text file that lists the classes in the order of their labels (0, 1, ...), one per line.
    A line is the class folder, optionally followed by a human-readable name."""

    check: Check = ImageRules.check
    """decode: decode every image once, and reject those that fail.
    header: only parse the image headers, which is faster, but damaged images are then found during training."""

    max_rejects: Fraction = MAX_REJECTS
    """Maximum fraction of images (0 to 1) that may be rejected, for example because they are damaged.
    The command fails if more are rejected."""

    strict: bool = False
    """Fail if the tars probably contain a mistake, such as missing classes or blank images.
    By default, only a warning is printed."""

    workers: Annotated[Workers | None, default("one per available CPU core")] = None
    """Number of worker processes."""

    def run(self) -> int:
        from shards.commands.index_tars import index_tars

        if not self.tars:
            raise UserError("no tars specified: pipeline index TAR [TAR ...]")
        check_ranges(self)
        index_tars(
            list(self.tars),
            ImageRules(check=self.check),
            self.classes,
            self.max_rejects,
            self.workers,
            strict=self.strict,
        )
        return _print_summary(self.tars[0].absolute().parent)


@dataclass(frozen=True)
class SampleDigits:
    """Write scikit-learn's 1,797 handwritten digits as JPEG files, in train/ and val/ with one folder per class."""

    out: Positional[Annotated[Path, arg(metavar="OUT")]]
    """Folder to create. It must be empty or not exist yet."""

    def run(self) -> int:
        from shards.commands.samples import write_digits

        return _print_written(self.out, write_digits(self.out))


@dataclass(frozen=True)
class SamplePhotos:
    """Write random crops of the photos in scikit-image, scikit-learn and matplotlib as JPEG files.

    Their sizes in pixels and bytes are distributed like ImageNet's, for benchmarks without ImageNet.
    They are in train/ and val/, with one folder per class.
    """

    out: Positional[Annotated[Path, arg(metavar="OUT")]]
    """Folder to create. It must be empty or not exist yet."""

    count: Annotated[int, Interval(ge=1, le=MAX_PHOTOS)] = 2000
    """Total number of images. One tenth of them is for validation."""

    seed: Seed = 0
    """Random seed. The same count and seed give the same files."""

    def run(self) -> int:
        from shards.commands.samples import write_photos

        check_ranges(self)
        return _print_written(self.out, write_photos(self.out, self.count, self.seed))


def _print_written(out: Path, written: dict[str, int]) -> int:
    _print(f"{out}: " + ", ".join(f"{n:,} {split} images" for split, n in sorted(written.items())))
    return 0


def _print_summary(out: Path) -> int:
    from shards.commands.summary import summarize
    from shards.format.dataset import ShardSet

    for line in summarize(ShardSet(out)):
        _print(line)
    return 0


def _print(line: str) -> None:
    print(one_line(line))

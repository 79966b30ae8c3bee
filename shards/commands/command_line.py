"""The command-line verbs of this package: options with their help, and `run()`, which returns the exit status."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from annotated_types import Interval
from tyro.conf import Positional, arg

from shards.convert.options import MAX_REJECTS, MIB, Format, Options
from shards.errors import UserError, explain_os_errors
from shards.files.output import check_output_folder
from shards.format.beton import BetonOptions, WriteMode
from shards.images.limits import MAX_SIDE
from shards.images.rules import Check, ImageRules
from shards.ranges import Fraction, Seed, check_ranges
from shards.redact import one_line
from shards.sources.scan import Layout, ScanOptions

if TYPE_CHECKING:
    from shards.format.dataset import ShardSet

MAX_SHARD_SIZE = 2**20
"""MiB, so 1 TiB: readers stage whole shards."""
MAX_SMART_RATIO = 1e6
MAX_PHOTOS = 2_000_000
"""More than ImageNet-1K has; 220 GB."""
Side = Annotated[int, Interval(ge=1, le=MAX_SIDE)]
Workers = Annotated[int, Interval(ge=1, le=4096)]


@dataclass(frozen=True)
class Shard:
    """Turn images into a shard set, from whatever layout they are in.

    Interrupted, even by kill -9, it resumes when the same command is given again.
    """

    source: Positional[Path]
    """Class folders (train/, val/ and test/ of them, or one), ILSVRC2012 tars, a folder of one tar a class, Kaggle's
    ILSVRC/, Parquet, WebDataset tars."""

    out: Path | None = None
    """Folder of the new set (default: SOURCE-shards beside the source)."""

    layout: Annotated[Layout | None, arg(name="from")] = None
    """Insist on the source's layout (default: whatever it looks like)."""

    val_fraction: float = ScanOptions.val_fraction
    """Fraction of each class that becomes the validation split, for sources that have none."""

    classes: Path | None = None
    """File that names the classes in the order of their labels, one a line: folder, then a human name if any."""

    shard_size: Annotated[int, Interval(ge=1, le=MAX_SHARD_SIZE)] = Options.shard_bytes // MIB
    """MiB per shard, about."""

    seed: Seed = ScanOptions.seed
    """Key of the shuffle."""

    check: Check = ImageRules.check
    """Decode every image once, or trust the headers."""

    format: Format = Options.format
    """WebDataset tars, FFCV's .beton, or both in the same order."""

    write_mode: WriteMode = BetonOptions.mode
    """What a .beton stores: JPEGs, pixels, or (smart) pixels where they take little more room."""

    smart_ratio: Annotated[float, Interval(ge=1, le=MAX_SMART_RATIO)] = BetonOptions.smart_ratio
    """With smart: pixels where they take at most this many times the JPEG's bytes."""

    max_side: Side | None = None
    """Shrink and re-encode images whose longer side is above this many pixels."""

    short_side: Side | None = None
    """Shrink and re-encode images whose shorter side is above this many pixels."""

    quality: Annotated[int, Interval(ge=1, le=100)] = ImageRules.quality
    """JPEG quality of images that are shrunk."""

    max_rejects: Fraction = MAX_REJECTS
    """Fraction of the images that may be left out because they cannot be used; more fail the run."""

    strict: bool = False
    """Refuse a source in which something may well be a mistake, instead of noting it."""

    workers: Workers | None = None
    """Processes (default: one per core)."""

    part: str | None = None
    """K/N: make only this part of the shards, for array jobs; --finish joins them."""

    finish: bool = False
    """Join the parts, when all have run."""

    def run(self) -> int:
        from shards.convert.convert import convert, default_out, finish
        from shards.convert.parts import ConversionPart
        from shards.format.manifest import MANIFEST_NAME

        with explain_os_errors(self.source):
            out = self.out or default_out(self.source)
        options = self._options()
        if not (out / MANIFEST_NAME).exists():
            check_output_folder(out, "--out", "name a folder of your own with --out")
        if self.finish:
            outcome = finish(out, self.max_rejects, self.workers, source=self.source, strict=self.strict)
        else:
            part = ConversionPart.parse(self.part) if self.part is not None else None
            outcome = convert(self.source, out, options, part)
            if outcome is None and part and not (out / MANIFEST_NAME).exists():
                _print(
                    f"{out}: part {part} is done; when all are, run: pipeline shard {self.source} --out {out} --finish"
                )
                return 0
        if outcome is None:
            compared = f", and {self.source} is what it was made from" if self.source.exists() else ""
            _print(f"{out}: already complete{compared}")
            return 0
        return _print_summary(out)

    def _options(self) -> Options:
        from shards.sources.naming.classes import check_fraction

        check_ranges(self)
        check_fraction(self.val_fraction)
        if self.finish and self.part is not None:
            raise UserError(f"--part {self.part} --finish: --finish joins all parts; leave out one of the two")
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
                check=self.check, max_side=self.max_side, short_side=self.short_side, quality=self.quality
            ),
            max_rejects=self.max_rejects,
            strict=self.strict,
            format=self.format,
            beton=BetonOptions(mode=self.write_mode, smart_ratio=self.smart_ratio),
        )


@dataclass(frozen=True)
class Verify:
    """Account for every byte of a set: hashes, tar headers, index rows, labels."""

    set: Positional[Path]
    """Folder of the set."""

    workers: Workers | None = None
    """Processes (default: one per core)."""

    set_digest: str | None = None
    """xxh3=HEX or sha256=HEX that the set's dataset.json must have (printed by 'pipeline info'); the same as #xxh3=HEX
    behind SET."""

    def run(self) -> int:
        from shards.commands.verify import verify

        check_ranges(self)
        path = _open(self.set, self.set_digest).path
        faults = verify(path, self.workers)
        for fault in faults:
            _print(f"fault: {fault}")
        _print(f"{path}: {f'{len(faults)} faults' if faults else 'every byte is as it should be'}")
        return 1 if faults else 0


@dataclass(frozen=True)
class Info:
    """Show what is in a set: splits, classes, sizes, repairs and rejects."""

    set: Positional[Path]
    """Folder of the set."""

    set_digest: str | None = None
    """xxh3=HEX or sha256=HEX that the set's dataset.json must have (printed by 'pipeline info'); the same as #xxh3=HEX
    behind SET."""

    def run(self) -> int:
        from rich.console import Console

        from shards.commands.info import describe

        Console().print(describe(_open(self.set, self.set_digest)))
        return 0


@dataclass(frozen=True)
class Index:
    """Make a set of existing WebDataset tars where they lie: an index and a manifest beside them, no copy.

    Their order stays as it is, so training is as well shuffled as they are; `pipeline shard` shuffles anew.
    """

    tars: Positional[tuple[Path, ...]]
    """Tars of KEY.jpg and KEY.cls, all in one folder; their names tell the split (train, val or test, as whole
    words)."""

    classes: Path | None = None
    """File that names the classes in the order of their labels, one a line: folder, then a human name if any."""

    check: Check = ImageRules.check
    """Decode every image once, or trust the headers."""

    max_rejects: Fraction = MAX_REJECTS
    """Fraction of the images that may be left out because they cannot be used; more fail the run."""

    strict: bool = False
    """Refuse tars in which something may well be a mistake, instead of noting it."""

    workers: Workers | None = None
    """Processes (default: one per core)."""

    def run(self) -> int:
        from shards.commands.index_tars import index_tars

        if not self.tars:
            raise UserError("no tars given")
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
    """Write scikit-learn's 1,797 handwritten digits as an ImageNet-like folder."""

    out: Positional[Path]
    """Folder to write."""

    def run(self) -> int:
        from shards.commands.samples import write_digits

        return _print_written(self.out, write_digits(self.out))


@dataclass(frozen=True)
class SamplePhotos:
    """Cut JPEGs from the photos that scikit-image, scikit-learn and matplotlib ship, sized like ImageNet's."""

    out: Positional[Path]
    """Folder to write."""

    count: Annotated[int, Interval(ge=1, le=MAX_PHOTOS)] = 2000
    """Images in all; a tenth of them for validation."""

    seed: Seed = 0
    """The same count and seed give the same files."""

    def run(self) -> int:
        from shards.commands.samples import write_photos

        check_ranges(self)
        return _print_written(self.out, write_photos(self.out, self.count, self.seed))


def _open(location: Path, digest: str | None) -> ShardSet:
    from shards.format.dataset import ShardSet
    from shards.format.manifest_digest import split_digest

    path, pin = split_digest(location, digest)
    return ShardSet(path, digest=pin)


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

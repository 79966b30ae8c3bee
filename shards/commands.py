"""The command-line verbs of this package: options with their help, and `run()`, which returns the exit status."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from shards.errors import UserError

MIB = 2**20


@dataclass(frozen=True)
class Shard:
    """Turn a folder of images into a shard set.

    Interrupted, even by kill -9, it goes on where it was when the same command is given again.
    """

    source: Positional[Path]
    """Folder of train/ and val/ with class folders, or of class folders alone."""

    out: Path | None = None
    """Folder of the new set (default: SOURCE-shards beside the source)."""

    shard_size: int = 256
    """MiB per shard, about."""

    seed: int = 0
    """Key of the shuffle."""

    check: Literal["decode", "header"] = "decode"
    """Decode every image once, or trust the headers."""

    max_rejects: float = 0.001
    """Share of the images that may be left out because they cannot be used; more fail the run."""

    workers: int | None = None
    """Processes (default: one per core)."""

    def run(self) -> int:
        from shards.convert import Options, convert, default_out
        from shards.images import ImageRules

        if self.shard_size < 1:
            raise UserError(f"--shard-size {self.shard_size}: at least 1 MiB")
        if self.workers is not None and self.workers < 1:
            raise UserError(f"--workers {self.workers}: at least 1")
        out = self.out or default_out(self.source)
        outcome = convert(
            self.source,
            out,
            Options(
                seed=self.seed,
                shard_bytes=self.shard_size * MIB,
                rules=ImageRules(check=self.check),
                max_rejects=self.max_rejects,
                workers=self.workers,
            ),
        )
        if outcome is None:
            print(f"{out}: already complete")
            return 0
        parts = [f"{split.samples:,} {name}" for name, split in outcome.manifest.splits.items()]
        print(
            f"{out}: {' + '.join(parts)} images of {len(outcome.manifest.classes):,} classes, "
            f"{outcome.repaired:,} repaired, {outcome.rejected:,} rejected"
        )
        return 0


@dataclass(frozen=True)
class Verify:
    """Account for every byte of a set: hashes, tar headers, index rows, labels."""

    set: Positional[Path]
    """Folder of the set."""

    workers: int | None = None
    """Processes (default: one per core)."""

    def run(self) -> int:
        from shards.verify import verify

        faults = verify(self.set, self.workers)
        for fault in faults:
            print(f"fault: {fault}")
        print(f"{self.set}: {f'{len(faults)} faults' if faults else 'every byte is as it should be'}")
        return 1 if faults else 0


@dataclass(frozen=True)
class Info:
    """Show what is in a set: splits, classes, sizes, repairs and rejects."""

    set: Positional[Path]
    """Folder of the set."""

    def run(self) -> int:
        from rich.console import Console

        from shards.dataset import ShardSet
        from shards.info import describe

        Console().print(describe(ShardSet(self.set)))
        return 0


@dataclass(frozen=True)
class SampleDigits:
    """Write scikit-learn's 1,797 handwritten digits as an ImageNet-like folder."""

    out: Positional[Path]
    """Folder to write."""

    def run(self) -> int:
        from shards.samples import write_digits

        return _say_written(self.out, write_digits(self.out))


@dataclass(frozen=True)
class SamplePhotos:
    """Cut JPEGs from the photos that scikit-image, scikit-learn and matplotlib ship, sized like ImageNet's."""

    out: Positional[Path]
    """Folder to write."""

    count: int = 2000
    """Images in all; a tenth of them for validation."""

    seed: int = 0
    """The same count and seed give the same files."""

    def run(self) -> int:
        from shards.samples import write_photos

        return _say_written(self.out, write_photos(self.out, self.count, self.seed))


def _say_written(out: Path, written: dict[str, int]) -> int:
    print(f"{out}: " + ", ".join(f"{n:,} {split} images" for split, n in sorted(written.items())))
    return 0

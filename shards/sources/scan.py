"""What a source is asked for, and what it gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # command lines import the options, and start without loading the rest
    from shards.format.manifest_fields import ClassEntry
    from shards.sources.listing import Listing
    from shards.sources.unused import UnusedEntry

TRAIN, VAL, TEST = "train", "val", "test"

Layout = Literal["class-tars", "folder", "ilsvrc", "kaggle", "parquet", "webdataset"]


@dataclass(frozen=True, kw_only=True)
class ScanOptions:
    """How to read a source."""

    layout: Layout | None = None
    """None = whatever it looks like."""
    val_fraction: float = 0.0
    """Fraction of each class that becomes the validation split, for sources that have none."""
    classes: Path | None = None
    """File that names the classes in the order of their labels, one a line: folder, then a human name if any."""
    seed: int = 0
    workers: int | None = None


@dataclass(frozen=True)
class Scan:
    """What a source holds."""

    layout: Layout
    classes: tuple[ClassEntry, ...]
    splits: dict[str, Listing]
    unused: tuple[UnusedEntry, ...] = ()
    """What of the source the set does not use."""
    notes: tuple[str, ...] = ()
    """Lines that the person should see."""
    warnings: tuple[str, ...] = ()
    """Lines about what may well be a mistake; --strict refuses the source for them."""
    digest: str = ""
    """Tells the source from others (`shards.sources.identity`), before --classes and --val-fraction; set by `scan`."""
    files: dict[str, str] = field(default_factory=dict)
    """Parquet file below the source -> its digest; set by `scan`."""

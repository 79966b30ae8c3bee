"""Options for scanning a source, and the result of a scan."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # the command line imports this module and must start fast
    from shards.format.manifest_fields import ClassEntry
    from shards.sources.listing import Listing
    from shards.sources.unused import UnusedEntry

TRAIN, VAL, TEST = "train", "val", "test"

Layout = Literal["class-tars", "folder", "ilsvrc", "kaggle", "parquet", "webdataset"]


@dataclass(frozen=True, kw_only=True)
class ScanOptions:
    """Options for scanning a source."""

    layout: Layout | None = None
    """Layout of the source; None: detect it."""
    val_fraction: float = 0.0
    """Fraction of each class that is split off for validation, for sources without a validation split."""
    classes: Path | None = None
    """Text file with one class per line, in the order of the labels: folder, then optionally a readable name."""
    seed: int = 0
    workers: int | None = None


@dataclass(frozen=True)
class Scan:
    """Result of a scan: the classes and images of a source."""

    layout: Layout
    classes: tuple[ClassEntry, ...]
    splits: dict[str, Listing]
    unused: tuple[UnusedEntry, ...] = ()
    """Files of the source that are not used."""
    notes: tuple[str, ...] = ()
    """Messages for the user."""
    warnings: tuple[str, ...] = ()
    """Messages about likely mistakes, for which --strict rejects the source."""
    digest: str = ""
    """Digest of the source before --classes and --val-fraction apply (`shards.sources.identity`); set by `scan`."""
    files: dict[str, str] = field(default_factory=dict)
    """Path of each Parquet file relative to the source -> its digest; set by `scan`."""

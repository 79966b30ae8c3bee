"""What a conversion decides before it opens the first image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shards.format.beton import BetonOptions
from shards.format.manifest_fields import ClassEntry
from shards.schema import Count, Digest
from shards.sources.scan import Layout
from shards.sources.unused import UnusedEntry


@dataclass(frozen=True, kw_only=True)
class ConversionPlan:
    """The decisions of a conversion, which a resumed one keeps."""

    tool: str
    """Name and version; another may not give the same bytes."""
    options: dict[str, Any]
    """Everything that changes bytes; a resumed conversion must be asked for the same."""
    source: str
    """Absolute path, printable."""
    layout: Layout
    digest: Digest
    """Tells the source from others, and from itself after it has changed (`shards.sources.identity`)."""
    classes: tuple[ClassEntry, ...]
    shards: dict[str, Count]
    """Split -> number of shards."""
    unused: tuple[UnusedEntry, ...]
    notes: tuple[str, ...]
    doubts: tuple[str, ...]
    folders: dict[str, int]
    """Folder above those that hold images or archives, percent-encoded -> time of its last change, in seconds since
    1970."""
    source_files: dict[str, Digest]
    """Parquet file below the source -> its digest."""
    files: dict[str, Digest]
    """Name in the work folder -> xxh3-64 of the files of the listing."""

    @property
    def keeps_tars(self) -> bool:
        return bool(self.options["format"] != "ffcv")

    @property
    def beton(self) -> BetonOptions | None:
        """None when no .beton is asked for."""
        return BetonOptions(**self.options["beton"]) if self.options["beton"] else None

    @property
    def jobs(self) -> list[tuple[str, int]]:
        """(split, shard), in order."""
        return [(split, i) for split, n in self.shards.items() for i in range(n)]

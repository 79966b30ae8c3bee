"""The conversion plan: all decisions that are made before the first image is read."""

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
    """The decisions of a conversion. They are saved so that a resumed conversion makes the same decisions."""

    tool: str
    """Name and version of this project; another version may write different bytes."""
    options: dict[str, Any]
    """All options that affect the bytes of the set; must be the same on resume."""
    source: str
    """Absolute path of the source, with symbolic links resolved and special characters escaped."""
    layout: Layout
    digest: Digest
    """Digest that identifies the source and its content (`shards.sources.identity`)."""
    classes: tuple[ClassEntry, ...]
    shards: dict[str, Count]
    """Split -> number of shards."""
    unused: tuple[UnusedEntry, ...]
    notes: tuple[str, ...]
    """Notes about the source, which are printed and written to the manifest."""
    warnings: tuple[str, ...]
    """Warnings about likely mistakes in the source; --strict fails on them."""
    folders: dict[str, int]
    """Percent-encoded path of each parent folder of an archive or of a folder with images -> its modification time, in
    seconds since 1970."""
    source_files: dict[str, Digest]
    """Path of each Parquet file, relative to the source -> its digest."""
    files: dict[str, Digest]
    """Name of each file of the listing in the work folder -> its xxh3-64."""

    @property
    def keeps_tars(self) -> bool:
        return bool(self.options["format"] != "ffcv")

    @property
    def beton(self) -> BetonOptions | None:
        """Options of the .beton files; None if none are written."""
        return BetonOptions(**self.options["beton"]) if self.options["beton"] else None

    @property
    def jobs(self) -> list[tuple[str, int]]:
        """(split, shard) of every shard, in order."""
        return [(split, i) for split, n in self.shards.items() for i in range(n)]

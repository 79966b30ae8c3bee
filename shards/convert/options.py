"""Options of a conversion."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import xxhash

from shards.files.regular import read_list
from shards.format.beton import BetonOptions
from shards.images.rules import ImageRules
from shards.sources.scan import ScanOptions

MIB = 2**20
MAX_REJECTS = 0.001
"""Default of the share of the images that may be left out because they cannot be used."""
Format = Literal["tar", "ffcv", "both"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a set is to be made."""

    scan: ScanOptions = field(default_factory=ScanOptions)
    shard_bytes: int = 256 * MIB
    rules: ImageRules = field(default_factory=ImageRules)
    max_rejects: float = MAX_REJECTS
    strict: bool = False
    """Refuse a source with doubts."""
    format: Format = "tar"
    beton: BetonOptions = field(default_factory=BetonOptions)

    @property
    def workers(self) -> int | None:
        return self.scan.workers

    @property
    def changing_bytes(self) -> dict[str, Any]:
        classes = self.scan.classes
        return {
            "seed": self.scan.seed,
            "shard_bytes": self.shard_bytes,
            "val_fraction": self.scan.val_fraction,
            "classes": classes and xxhash.xxh3_64_hexdigest(read_list(classes, "a list of classes").encode()),
            "format": self.format,
            "beton": None if self.format == "tar" else asdict(self.beton),
            **asdict(self.rules),
        }

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
"""Default maximum fraction of images that may be rejected."""
Format = Literal["tar", "ffcv", "both"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `pipeline shard`."""

    scan: ScanOptions = field(default_factory=ScanOptions)
    shard_bytes: int = 256 * MIB
    """Maximum size of a shard in bytes, if the images are stored as they are in the source."""
    rules: ImageRules = field(default_factory=ImageRules)
    max_rejects: float = MAX_REJECTS
    """Maximum fraction of images that may be rejected."""
    strict: bool = False
    """Fail if the source probably contains a mistake."""
    format: Format = "tar"
    beton: BetonOptions = field(default_factory=BetonOptions)

    @property
    def workers(self) -> int | None:
        return self.scan.workers

    @property
    def changing_bytes(self) -> dict[str, Any]:
        """Return the options that affect the bytes of the set."""
        classes = self.scan.classes
        return {
            "seed": self.scan.seed,
            "shard_bytes": self.shard_bytes,
            "val_fraction": self.scan.val_fraction,
            "classes": classes and xxhash.xxh3_64_hexdigest(read_list(classes, "a list of classes").encode()),
            "format": self.format,
            "beton": None if self.format == "tar" else asdict(self.beton),
            **{name: value for name, value in asdict(self.rules).items() if value is not False},
        }

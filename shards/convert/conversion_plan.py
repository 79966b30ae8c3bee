"""The conversion plan: all decisions that are made before the first image is decoded."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from PIL import features

from shards.errors import UserError
from shards.format.beton import BetonOptions
from shards.format.manifest_fields import ClassEntry
from shards.format.tar import member_bytes
from shards.images.limits import MAX_ENCODED
from shards.images.rules import ImageRules
from shards.schema import Count, Digest
from shards.sources.listing import Listing
from shards.sources.scan import Layout
from shards.sources.unused import UnusedEntry

LABEL_BYTES = 8  # assumed size of a .cls member: an upper bound on the decimal digits of a label


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
    libraries: dict[str, str] = field(default_factory=dict)
    """Result of `library_versions` for the options."""
    expected_bytes: Count = 0
    """Expected size of a set of pixels in bytes (`shards.convert.pixel_size`); 0 for a set of JPEGs."""

    @property
    def keeps_tars(self) -> bool:
        return bool(self.options["format"] != "ffcv")

    @property
    def rules(self) -> ImageRules:
        """Options for converting images."""
        names = [each.name for each in fields(ImageRules)]
        return ImageRules(**{name: self.options[name] for name in names if name in self.options})

    @property
    def beton(self) -> BetonOptions | None:
        """Options of the .beton files; None if none are written."""
        return BetonOptions(**self.options["beton"]) if self.options["beton"] else None

    @property
    def jobs(self) -> list[tuple[str, int]]:
        """(split, shard) of every shard, in order."""
        return [(split, i) for split, n in self.shards.items() for i in range(n)]

    def check_libraries(self, out: Path) -> None:
        """Raise UserError if the installed libraries have other versions than at the start of the conversion."""
        installed = library_versions(self.rules)
        if installed != self.libraries:
            was, now = (" and ".join(map(" ".join, one.items())) for one in (self.libraries, installed))
            raise UserError(
                f"{out}: contains a conversion that was started with {was}, but {now} are installed; install the same "
                "versions to resume it, or remove the folder"
            )


def assign_to_shards(listing: Listing, split: str, seed: int, shard_bytes: int) -> tuple[Listing, NDArray[np.int64]]:
    """Shuffle a split globally and divide it into shards of about equal size.

    Samples are sorted by a seeded hash of their names, so their order depends neither on the order of the listing nor
    on the source layout. Their sizes in the source count, not the stored sizes, so that sets of the same source with
    other image options have the same samples in every shard.

    Args:
        listing: samples of the split, in any order.
        split: name of the split; part of the hash input.
        seed: seed of the hash.
        shard_bytes: upper limit of the shard size, if the images are stored as they are.

    Returns:
        The shuffled listing, and bounds int64 [shards + 1]: shard i has the rows bounds[i] to bounds[i + 1].
    """
    prefix = split.encode() + b"/"
    draws = np.fromiter(
        (xxhash.xxh3_64_intdigest(prefix + listing.name(i), seed) for i in range(len(listing))),
        dtype=np.uint64,
        count=len(listing),
    )
    rows = listing.rows[np.argsort(draws, kind="stable")]
    # Limit the sizes, because larger images are rejected unread, and a sparse file may have any apparent size.
    sizes = np.minimum(rows["size"], MAX_ENCODED).astype(np.int64)
    ends = np.cumsum(member_bytes(sizes) + member_bytes(np.int64(LABEL_BYTES)))
    total = int(ends[-1])
    shards = max(1, -(-total // shard_bytes))
    inner = np.searchsorted(ends, np.arange(1, shards) * (total / shards))
    bounds = np.unique(np.concatenate([[0], inner, [len(rows)]])).astype(np.int64)
    return Listing(rows, listing.names, listing.containers), bounds


def library_versions(rules: ImageRules) -> dict[str, str]:
    """Return the libraries whose versions may change the bytes of every image; empty if JPEGs are kept as they are."""
    if not (rules.pixels or rules.shrinks):
        return {}
    jpeg = features.version_feature("libjpeg_turbo")
    pillow = version("pillow") + (f" (libjpeg-turbo {jpeg})" if jpeg else "")
    return {"Pillow": pillow, "simplejpeg": version("simplejpeg")}

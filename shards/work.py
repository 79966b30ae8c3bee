"""The work folder of a conversion: what was decided at its start, and which shards are done.

Everything in it is published by rename, so whatever is there is whole; the folder goes when the manifest is written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.beton import BetonOptions
from shards.durable import TEMPORARY, durable_write, save_array
from shards.index import INDEX_DTYPE, Index
from shards.listing import Listing
from shards.manifest import ClassEntry

FOLDER = ".making"


@dataclass(frozen=True, kw_only=True)
class ShardDone:
    """What is recorded of a finished shard."""

    samples: int
    bytes: int
    hash: str
    repaired: dict[str, int]
    """Reason -> images."""
    rejected: list[tuple[str, str]]
    """Name and reason of each image left out."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a conversion decided before it opened the first image."""

    tool: str
    """Name and version; another may not give the same bytes."""
    options: dict[str, Any]
    """Everything that changes bytes; a resumed conversion must be asked for the same."""
    layout: str
    classes: tuple[ClassEntry, ...]
    shards: dict[str, int]
    """Split -> number of shards."""
    ignored: int
    notes: tuple[str, ...]

    @property
    def keeps_tars(self) -> bool:
        return self.options["format"] != "ffcv"

    @property
    def beton(self) -> BetonOptions | None:
        """None when no .beton is asked for."""
        return BetonOptions(**self.options["beton"]) if self.options["beton"] else None

    @property
    def jobs(self) -> list[tuple[str, int]]:
        """(split, shard), in order."""
        return [(split, i) for split, n in self.shards.items() for i in range(n)]


class Work:
    """The work folder inside the set that is being made."""

    def __init__(self, out: Path, keeps_tars: bool = True) -> None:
        self.out, self.keeps_tars = out, keeps_tars
        self.path = out / FOLDER

    # -- the plan

    def save_plan(self, plan: Plan) -> None:
        """The last thing that a scan writes."""
        durable_write(self.path / "plan.json", json.dumps(asdict(plan)).encode())

    def load_plan(self) -> Plan | None:
        try:
            raw = json.loads((self.path / "plan.json").read_bytes())
        except FileNotFoundError:
            return None
        classes = tuple(ClassEntry(**entry) for entry in raw.pop("classes"))
        return Plan(classes=classes, notes=tuple(raw.pop("notes")), **raw)

    def save_listing(self, split: str, listing: Listing, bounds: NDArray[np.int64]) -> None:
        listing.save(self.path / f"{split}.listing")
        save_array(self.path / f"{split}.bounds.npy", bounds)

    def load_listing(self, split: str) -> tuple[Listing, NDArray[np.int64]]:
        return Listing.load(self.path / f"{split}.listing"), np.load(self.path / f"{split}.bounds.npy", mmap_mode="r")

    # -- shards

    def tar(self, split: str, shard: int) -> Path:
        """A shard's tar; in the work folder where the set is to be a .beton alone."""
        return (self.out if self.keeps_tars else self.path) / f"{split}-{shard:06d}.tar"

    def save_done(self, split: str, shard: int, done: ShardDone, rows: Index) -> None:
        """Record a shard as finished, after its files are in place."""
        save_array(self._done(split, shard, "rows.npy"), rows)
        durable_write(self._done(split, shard, "json"), json.dumps(asdict(done)).encode())

    def is_done(self, split: str, shard: int) -> bool:
        """Whether the shard is recorded, and what is recorded is there."""
        if not self.keeps_tars and self.is_in_beton(split, shard):
            return True
        try:
            found = self.tar(split, shard).stat().st_size
            return found == self.load_done(split, shard).bytes and self._done(split, shard, "rows.npy").exists()
        except FileNotFoundError:
            return False

    def load_done(self, split: str, shard: int) -> ShardDone:
        return ShardDone(**json.loads(self._done(split, shard, "json").read_bytes()))

    def load_rows(self, split: str, shard: int) -> Index:
        rows = np.load(self._done(split, shard, "rows.npy"))
        assert rows.dtype == INDEX_DTYPE
        return rows

    # -- betons

    def beton(self, split: str) -> Path:
        return self.out / f"{split}.beton"

    def unfinished_beton(self, split: str) -> Path:
        return self.path / f"{split}.beton"

    def save_segment(self, split: str, shard: int, digest: str, rows: Index) -> None:
        """Record a shard's part of the .beton as filled."""
        save_array(self._done(split, shard, "beton.npy"), rows)
        durable_write(self._done(split, shard, "beton"), digest.encode())

    def load_segment(self, split: str, shard: int) -> tuple[str, Index]:
        """The part's hash, and the rows with offset, size and hash of what it holds."""
        return self._done(split, shard, "beton").read_text(), np.load(self._done(split, shard, "beton.npy"))

    def is_in_beton(self, split: str, shard: int) -> bool:
        """Whether the shard's part is recorded as filled, and the .beton is there."""
        there = self.beton(split).exists() or self.unfinished_beton(split).exists()
        return there and self._done(split, shard, "beton").exists()

    def _done(self, split: str, shard: int, suffix: str) -> Path:
        return self.path / f"{split}-{shard:06d}.{suffix}"

    # -- leftovers

    def remove_temporary(self, split: str, shard: int) -> None:
        """Remove what a killed process left half-written of a shard."""
        for folder in (self.out, self.path):
            _remove(folder.glob(f".{split}-{shard:06d}.*{TEMPORARY}"))

    def close(self) -> None:
        """Remove the work folder, and what killed processes left half-written beside it. The set is complete."""
        _remove(self.out.glob(f".*{TEMPORARY}"))
        shutil.rmtree(self.path, ignore_errors=True)


def _remove(leftovers: Iterable[Path]) -> None:
    for leftover in leftovers:
        leftover.unlink(missing_ok=True)

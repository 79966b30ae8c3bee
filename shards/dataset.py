"""A finished shard set, opened for reading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from shards.errors import ShardSetError
from shards.index import Index, open_index
from shards.manifest import Manifest, SplitEntry


class ShardSet:
    """Manifest, indexes and shard paths of one set. Opening reads the manifest alone; indexes are mapped on demand."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.manifest = Manifest.load(self.path)
        self._indexes: dict[str, Index] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the indexes, which another process maps for itself."""
        return vars(self) | {"_indexes": {}}

    def split(self, name: str) -> SplitEntry:
        """The split's manifest entry.

        Raises:
            ShardSetError: the set has no such split.
        """
        try:
            return self.manifest.splits[name]
        except KeyError:
            known = ", ".join(sorted(self.manifest.splits)) or "none"
            raise ShardSetError(f"{self.path}: no split '{name}' (it has: {known})") from None

    def index(self, name: str) -> Index:
        """The split's index, `INDEX_DTYPE` [samples], memory-mapped."""
        if name not in self._indexes:
            split = self.split(name)
            self._indexes[name] = open_index(self.path / split.index, split.samples)
        return self._indexes[name]

    def shard_path(self, name: str, shard: int) -> Path:
        return self.path / self.split(name).shards[shard].name

    def shard_samples(self, name: str) -> np.ndarray:
        """Samples of each shard, int64 [shards]: all that the plan needs to know of a split."""
        return np.array([shard.samples for shard in self.split(name).shards], dtype=np.int64)

    def check_sizes(self, name: str) -> None:
        """A second's check before training: every shard is there with the size the manifest promises.

        Raises:
            ShardSetError: names the first shard that is missing, truncated or of another size.
        """
        for file, expected in self.split(name).files.items():
            path = self.path / file
            try:
                found = path.stat().st_size
            except FileNotFoundError:
                raise ShardSetError(f"{path}: missing; copy it again, or run 'pipeline verify {self.path}'") from None
            if found != expected:
                fact = "truncated" if found < expected else "not the file the manifest describes"
                raise ShardSetError(
                    f"{path}: {expected} bytes expected, {found} found: {fact}; "
                    f"copy it again, or run 'pipeline shard' with the source to make it anew"
                )

"""A finished shard set, opened for reading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from shards.errors import ShardSetError, storage_error
from shards.format.index import Index, check_rows, open_index
from shards.format.manifest import MANIFEST_NAME, Manifest
from shards.format.manifest_digest import ManifestDigest
from shards.format.manifest_fields import SplitEntry


class ShardSet:
    """Manifest, indexes and shard paths of one set. Opening reads the manifest alone; indexes are read on demand.

    Args:
        path: folder.
        manifest: content of the set's dataset.json; None = it is read from the folder.
        digest: that the manifest must have.

    Raises:
        ShardSetError: no set, a damaged manifest, or not the one that was pinned.
    """

    def __init__(
        self, path: Path | str, *, manifest: bytes | None = None, digest: ManifestDigest | None = None
    ) -> None:
        self.path = Path(path)
        content = Manifest.read(self.path) if manifest is None else manifest
        if digest is not None:
            digest.check(content, self.path / MANIFEST_NAME)
        self.digests = ManifestDigest.of(content), ManifestDigest.of(content, "sha256")
        """Of the manifest as it is stored, xxh3 and SHA-256: what may be pinned."""
        self.manifest = Manifest.parse(content, self.path / MANIFEST_NAME)
        self._indexes: dict[str, Index] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return everything but the indexes, which another process reads for itself."""
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

    def index(self, name: str, *, beton: bool = False) -> Index:
        """Read the split's index once, check it against the manifest, and keep it.

        Args:
            beton: the index of what the split's .beton stores, instead of its tars.

        Returns:
            Read-only `INDEX_DTYPE` [samples].

        Raises:
            ShardSetError: it is damaged, or not the one that the manifest describes.
            StorageFailed: it cannot be read.
        """
        split = self.split(name)
        stored = split.beton if beton else None
        file, digest = (stored.index, stored.index_hash) if stored else (split.index, split.index_hash)
        if file not in self._indexes:
            index = open_index(self._fetch_index(file, split.samples, digest), samples=split.samples, digest=digest)
            size_of = [stored.bytes if stored else shard.bytes for shard in split.shards]
            check_rows(
                self.path / file,
                index,
                samples=self.shard_samples(name),
                sizes=np.array(size_of, np.int64),
                classes=len(self.manifest.classes),
                in_one_file=stored is not None,
                pixels=stored is not None and stored.mode == "raw",
            )
            self._indexes[file] = index
        return self._indexes[file]

    def _fetch_index(self, file: str, samples: int, digest: str) -> Path:
        """Return the path of an index file."""
        return self.path / file

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
            except OSError as error:
                raise storage_error(path, error, f"copy it again, or run 'pipeline verify {self.path}'") from error
            if found != expected:
                fact = "truncated" if found < expected else "not the file the manifest describes"
                raise ShardSetError(
                    f"{path}: {expected} bytes expected, {found} found: {fact}; "
                    f"copy it again, or run 'pipeline shard' with the source to make it anew"
                )

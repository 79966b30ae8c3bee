"""Open a finished shard set for reading."""

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
    """Manifest, indexes and shard paths of one set. Opening reads only the manifest; indexes are read on demand.

    Args:
        path: folder of the set.
        manifest: content of the set's dataset.json; None: read it from the folder.
        digest: expected digest of the manifest; None: not checked.

    Raises:
        ShardSetError: the folder is not a shard set, or its manifest is damaged or has a different digest.
    """

    def __init__(
        self, path: Path | str, *, manifest: bytes | None = None, digest: ManifestDigest | None = None
    ) -> None:
        self.path = Path(path)
        content = Manifest.read(self.path) if manifest is None else manifest
        if digest is not None:
            digest.check(content, self.path / MANIFEST_NAME)
        self.digests = ManifestDigest.of(content), ManifestDigest.of(content, "sha256")
        """xxh3 and SHA-256 digest of the manifest file."""
        self.manifest = Manifest.parse(content, self.path / MANIFEST_NAME)
        self._indexes: dict[str, Index] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to pickle, without the indexes: the process that loads it reads them again."""
        return vars(self) | {"_indexes": {}}

    def split(self, name: str) -> SplitEntry:
        """Return the manifest entry of a split.

        Raises:
            ShardSetError: the set has no such split.
        """
        try:
            return self.manifest.splits[name]
        except KeyError:
            known = ", ".join(sorted(self.manifest.splits)) or "none"
            raise ShardSetError(f"{self.path}: no split '{name}' (it has: {known})") from None

    def index(self, name: str, *, beton: bool = False) -> Index:
        """Return the index of a split. It is read and checked against the manifest only once.

        Args:
            beton: return the index of the split's .beton file instead of its tars.

        Returns:
            Read-only `INDEX_DTYPE` [samples].

        Raises:
            ShardSetError: the index is damaged, or differs from the one that the manifest describes.
            StorageFailed: the index cannot be read.
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
        """Return the number of samples of each shard, int64 [shards], from which a plan is computed."""
        return np.array([shard.samples for shard in self.split(name).shards], dtype=np.int64)

    def check_sizes(self, name: str) -> None:
        """Check quickly, before training, that every shard exists with the size in the manifest.

        Raises:
            ShardSetError: a shard is missing, truncated or of a different size; the message names the first one.
        """
        for file, expected in self.split(name).files.items():
            path = self.path / file
            try:
                found = path.stat().st_size
            except OSError as error:
                raise storage_error(path, error, f"copy it again, or run 'pipeline verify {self.path}'") from error
            if found != expected:
                fact = "truncated" if found < expected else "not the file that the manifest describes"
                raise ShardSetError(
                    f"{path}: expected {expected} bytes, found {found}: {fact}; copy it again, or convert the source "
                    "again with 'pipeline shard'"
                )

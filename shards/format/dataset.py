"""Open a finished shard set for reading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from shards.errors import ShardSetError, storage_error
from shards.format.index import Index, check_rows, open_index
from shards.format.manifest import MANIFEST_NAME, Manifest
from shards.format.manifest_digest import ManifestDigest
from shards.format.manifest_fields import SplitEntry


class ShardSet:
    """Manifest, indexes and shard paths of one set. Opening reads only the manifest; indexes are read on demand.

    After `restrict`, the set consists of the selected classes and samples only: sample ids and labels count these.

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
        self.complete_manifest = self.manifest
        """The manifest with all classes and samples, also after `restrict`."""
        self._rows: dict[str, NDArray[np.unsignedinteger]] = {}
        self._labels: NDArray[np.uint32] | None = None
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

    def restrict(self, classes: Sequence[int], rows: Mapping[str, NDArray[np.unsignedinteger]]) -> None:
        """Reduce the set to some of its classes and samples. Call at most once, before the set is used.

        Args:
            classes: labels of the classes to keep, ascending. They are renumbered from 0.
            rows: split -> ids of the samples to keep, ascending, integers [samples], at least one. Other splits are
                removed from `manifest`.
        """
        manifest = self.complete_manifest
        splits = {}
        for name, ids in rows.items():
            split = manifest.splits[name]
            ends = np.cumsum([shard.samples for shard in split.shards])
            counts = np.diff(np.searchsorted(ids, ends.astype(ids.dtype)), prepend=0).tolist()
            shards = tuple(replace(shard, samples=count) for shard, count in zip(split.shards, counts, strict=True))
            splits[name] = replace(split, samples=len(ids), shards=shards)
        self.manifest = replace(manifest, classes=tuple(manifest.classes[label] for label in classes), splits=splits)
        self._rows = dict(rows)
        self._labels = np.full(len(manifest.classes), len(manifest.classes), np.uint32)
        self._labels[list(classes)] = np.arange(len(classes))
        complete, self._indexes = self._indexes, {}
        for name, split in splits.items():
            if split.index in complete:
                self._indexes[split.index] = self._restricted(name, complete[split.index])

    @property
    def restricted(self) -> bool:
        """Whether `restrict` has been called."""
        return self._labels is not None

    def selection_digest(self, name: str) -> str | None:
        """Return the xxh3-64 of the ids of a split that `restrict` keeps, 16 hex digits; None: all samples."""
        return xxhash.xxh3_64_hexdigest(self._rows[name].tobytes()) if self.restricted else None

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
        file = split.beton.index if beton and split.beton else split.index
        if file not in self._indexes:
            self._indexes[file] = self._restricted(name, self.complete_index(name, beton=beton))
        return self._indexes[file]

    def _restricted(self, name: str, index: Index) -> Index:
        """Return the rows that `restrict` keeps, with renumbered labels."""
        if self._labels is None:
            return index
        rows = index[self._rows[name]]
        rows["label"] = self._labels[rows["label"]]
        rows.flags.writeable = False
        return rows

    def complete_index(self, name: str, *, beton: bool = False) -> Index:
        """Read the index of a split with all its samples, also after `restrict`. See `index`."""
        split = self.complete_manifest.splits[name]
        stored = split.beton if beton else None
        file, digest = (stored.index, stored.index_hash) if stored else (split.index, split.index_hash)
        index = open_index(self._fetch_index(file, split.samples, digest), samples=split.samples, digest=digest)
        check_rows(
            self.path / file,
            index,
            samples=np.array([shard.samples for shard in split.shards], np.int64),
            sizes=np.array([stored.bytes if stored else shard.bytes for shard in split.shards], np.int64),
            classes=len(self.complete_manifest.classes),
            in_one_file=stored is not None,
            pixels=stored.mode == "raw" if stored else split.pixels,
        )
        return index

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

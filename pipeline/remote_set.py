"""A finished shard set behind a URL, opened for reading."""

from __future__ import annotations

import io
import os
import tempfile
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from pipeline.cache import Cache
from pipeline.remote import Remote, is_remote
from pipeline.staging import CHUNK, StagedFile, StagedFiles, stage, whole
from shards.dataset import ShardSet
from shards.errors import ShardSetError
from shards.index import INDEX_DTYPE, Index
from shards.manifest import MANIFEST_NAME

# Of the cache: the rest is for indexes, and for what ranks at different places want at the same time.
SHARE_FOR_SHARDS = 0.9
_INDEX_HEADER = 4096  # bytes that hold it in any case
_LOOK_AGAIN_SECONDS = 0.1
GIB = 1 << 30


def open_set(location: Path | str, *, cache: Path | None = None, cache_gib: float | None = None) -> ShardSet:
    """Open a set in a folder, or behind a URL that fsspec knows (s3://bucket/set, https://host/set).

    Args:
        cache: where the files of a remote set are staged, shared by all processes of a node. None = $FAT_CACHE, else
            fat-pipeline-cache in the folder for temporary files.
        cache_gib: size that the cache may have in GiB; None = four fifths of what is free there.

    Raises:
        UserError: no such set, a server that cannot be reached, or a cache that cannot be used.
    """
    if not is_remote(location):
        return ShardSet(location)
    named = os.environ.get("FAT_CACHE")
    folder = cache or (Path(named) if named else Path(tempfile.gettempdir()) / f"fat-pipeline-cache-{os.getuid()}")
    return RemoteSet(str(location), Cache(folder, None if cache_gib is None else int(cache_gib * GIB)))


class RemoteSet(ShardSet):
    """Manifest and indexes are staged when it is opened and used, shards as readers ask for them.

    In the cache a set's folder is named after its manifest's hash: another version of the set is another folder.

    Args:
        url: of the set's folder.
        cache: of this node.
    """

    def __init__(self, url: str, cache: Cache) -> None:
        self.url, self.cache = url.rstrip("/"), cache
        self._remote = Remote(self.url)
        manifest = self._remote.read_all(MANIFEST_NAME)
        digest = xxhash.xxh3_64_hexdigest(manifest)
        folder = cache.folder / f"{self.url.rpartition('/')[2]}-{digest}"
        leases: list[int] = []
        weakref.finalize(self, _give_back, leases)
        self._folder, self._own_leases = folder, leases
        self._staged: set[str] = set()  # splits whose indexes the process has staged that this set was pickled in
        self._stage_now(whole(MANIFEST_NAME, len(manifest), digest))
        super().__init__(folder)

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to this process: the connection, and the leases, which keep files for its copies too."""
        staged = self._staged | self._indexes.keys()
        return super().__getstate__() | {"_remote": None, "_own_leases": [], "_staged": staged}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _remote=Remote(state["url"]))
        weakref.finalize(self, _give_back, self._own_leases)

    def index(self, name: str) -> Index:
        """The split's index, `INDEX_DTYPE` [samples], staged and memory-mapped."""
        if name not in self._indexes and name not in self._staged:
            entry = self.split(name)
            head = io.BytesIO(self._remote.read(entry.index, 0, _INDEX_HEADER))
            try:
                np.lib.format.read_magic(head)
                np.lib.format.read_array_header_1_0(head)
            except ValueError as error:
                raise ShardSetError(f"{self.url}/{entry.index}: damaged index ({error}); copy it again") from error
            self._stage_now(whole(entry.index, head.tell() + entry.samples * INDEX_DTYPE.itemsize, entry.index_hash))
        return super().index(name)

    def check_sizes(self, name: str) -> None:
        """Nothing: each file is checked, by its hash, when it is staged."""

    def files(self, files: list[StagedFile]) -> StagedFiles:
        """Files of the set, to be staged as they are needed."""
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        share = int(self.cache.limit * SHARE_FOR_SHARDS) // ranks
        return StagedFiles(files, remote=Remote(self.url), cache=self.cache, folder=self._folder, share=share)

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file, past the cache."""
        return b"".join(self._remote.read(name, at, min(at + CHUNK, stop)) for at in range(start, stop, CHUNK))

    def _stage_now(self, file: StagedFile) -> None:
        while (lease := stage(file, self._remote, self.cache, self._folder)) is None:
            time.sleep(_LOOK_AGAIN_SECONDS)  # another process is at it
        self._own_leases.append(lease)


def _give_back(leases: list[int]) -> None:
    for lease in leases:
        os.close(lease)

"""Open a complete shard set, in a folder or on a server, for reading."""

from __future__ import annotations

import math
import os
import re
import weakref
from pathlib import Path
from typing import Any

import xxhash

from pipeline.storage.cache.cache import Cache
from pipeline.storage.remote.client import Remote
from pipeline.storage.remote.staged_files import StagedFiles
from pipeline.storage.remote.staging import StagedFile, stage_now, whole_file
from pipeline.storage.remote.url import check_url, is_remote, warn_without_tls
from shards.errors import UserError
from shards.files.temporary import temporary_folder
from shards.format.dataset import ShardSet
from shards.format.index import index_bytes
from shards.format.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest
from shards.format.manifest_digest import ManifestDigest, split_digest
from shards.memory import GIB

# Fraction of the cache for shards that the plan requests next. The rest holds indexes, and shards of slower ranks.
FRACTION_FOR_SHARDS = 0.9
_SHOWN_OF_URL = 64  # maximum characters of the URL in the name of the set's folder


def open_set(
    location: Path | str,
    *,
    cache: Path | None = None,
    cache_gib: float | None = None,
    cache_shared: bool = False,
    digest: str | None = None,
    local_ranks: int = 1,
) -> ShardSet:
    """Open a shard set in a folder, or at a URL that fsspec supports (s3://bucket/set, https://host/set).

    Args:
        location: folder or URL. If it ends with #xxh3=HEX or #sha256=HEX, the set's manifest must have that digest.
        cache: folder in which the processes of a node stage the files of a remote set, in a subfolder of their own.
            None: the folder for temporary files.
        cache_gib: maximum size of the cache in GiB; None: 80 % of the free disk space.
        cache_shared: share the cache with all users in the group of `cache`.
        digest: xxh3=HEX or sha256=HEX that the manifest must have; an alternative to a digest in `location`.
        local_ranks: number of ranks on this node; each may keep an equal part of the cache in use.

    Raises:
        UserError: the set does not exist, does not have the digest, or cannot be reached; the URL contains
            credentials; or the cache cannot be used.
    """
    plain, pin = split_digest(location, digest)
    if not is_remote(plain):
        return ShardSet(plain, digest=pin)
    check_url(plain)
    warn_without_tls(plain)
    if cache_gib is not None and not 0 < cache_gib < math.inf:
        raise UserError(f"--cache-size {cache_gib}: expected a finite number of GiB above 0")
    limit = None if cache_gib is None else int(cache_gib * GIB)
    return RemoteSet(plain, Cache(cache or temporary_folder(), limit, cache_shared), pin, local_ranks=local_ranks)


class RemoteSet(ShardSet):
    """A shard set on a server. The manifest is staged when the set is opened, indexes and shards when they are needed.

    The name of the set's folder in the cache contains the hash of the manifest, so that every version of a set has a
    folder of its own.

    Args:
        url: URL of the set's folder.
        cache: the cache of this node.
        digest: digest that the manifest must have.
        local_ranks: number of ranks on this node.
    """

    def __init__(self, url: str, cache: Cache, digest: ManifestDigest | None = None, *, local_ranks: int = 1) -> None:
        self.url, self.cache, self._local_ranks = url.rstrip("/"), cache, local_ranks
        self._remote = Remote(self.url)
        self._facts = self._remote.facts
        content = self._remote.read_all(MANIFEST_NAME, MAX_MANIFEST_BYTES)
        # Verify the manifest before anything is staged or requested.
        if digest is not None:
            digest.check(content, f"{self.url}/{MANIFEST_NAME}")
        Manifest.parse(content, f"{self.url}/{MANIFEST_NAME}")
        name = xxhash.xxh3_64_hexdigest(content)
        folder = cache.folder / set_folder(self.url, name)
        leases: list[int] = []
        weakref.finalize(self, _close_leases, leases)
        self._folder, self._own_leases = folder, leases
        self._staged: set[str] = set()  # names of the indexes that are staged already
        self._stage_now(whole_file(MANIFEST_NAME, len(content), name))
        super().__init__(folder, manifest=content)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without connection and leases. This process's leases also protect the files of unpickled copies."""
        staged = self._staged | self._indexes.keys()
        return super().__getstate__() | {"_remote": None, "_own_leases": [], "_staged": staged}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _remote=Remote(state["url"], state["_facts"]))
        weakref.finalize(self, _close_leases, self._own_leases)

    def _fetch_index(self, file: str, samples: int, digest: str) -> Path:
        if file not in self._staged:
            self._stage_now(whole_file(file, index_bytes(samples), digest))
        return self.path / file

    def check_sizes(self, name: str) -> None:
        """Do nothing: each file is verified by its hash when it is staged."""

    def files(self, files: list[StagedFile]) -> StagedFiles:
        """Return files of the set, which are staged when they are needed."""
        max_bytes = int(self.cache.limit * FRACTION_FOR_SHARDS) // self._local_ranks
        remote = Remote(self.url, self._facts)
        return StagedFiles(files, remote=remote, cache=self.cache, folder=self._folder, max_bytes=max_bytes)

    def _stage_now(self, file: StagedFile) -> None:
        self._own_leases.append(stage_now(file, self._remote, self.cache, self._folder))


def set_folder(url: str, digest: str) -> str:
    """Return the name of a set's folder in the cache: the last component of its URL, sanitized, and a digest.

    Args:
        digest: hash of the manifest, 16 hex digits.
    """
    last = re.split(r"[?#]", url, maxsplit=1)[0].rstrip("/").rpartition("/")[2]
    return f"{re.sub(r'[^A-Za-z0-9._-]', '_', last).lstrip('.')[:_SHOWN_OF_URL] or 'set'}-{digest}"


def _close_leases(leases: list[int]) -> None:
    for lease in leases:
        os.close(lease)

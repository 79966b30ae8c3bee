"""A finished shard set behind a URL, opened for reading."""

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

# Of the cache: the rest is for indexes, and for what ranks at different places want at the same time.
SHARE_FOR_SHARDS = 0.9
_SHOWN_OF_URL = 64
GIB = 1 << 30


def open_set(
    location: Path | str,
    *,
    cache: Path | None = None,
    cache_gib: float | None = None,
    cache_shared: bool = False,
    digest: str | None = None,
    local_ranks: int = 1,
) -> ShardSet:
    """Open a set in a folder, or behind a URL that fsspec knows (s3://bucket/set, https://host/set).

    Args:
        location: with #xxh3=HEX or #sha256=HEX behind it, the set's manifest must have that digest.
        cache: where the files of a remote set are staged, in a subfolder of its own, by all processes of a node.
            None = the folder for temporary files.
        cache_gib: size that the cache may have in GiB; None = four fifths of what is free there.
        cache_shared: all users in the group of `cache` use one cache.
        digest: xxh3=HEX or sha256=HEX that the set's manifest must have; another way to say the same.
        local_ranks: ranks of this machine, each of which may hold an equal share of the cache.

    Raises:
        UserError: no such set, or another than the digest says, a server that cannot be reached, a URL with
            credentials, or a cache that cannot be used.
    """
    plain, pin = split_digest(location, digest)
    if not is_remote(plain):
        return ShardSet(plain, digest=pin)
    check_url(plain)
    warn_without_tls(plain)
    if cache_gib is not None and not 0 < cache_gib < math.inf:
        raise UserError(f"--cache-size {cache_gib}: expected a finite number of GiB above 0")
    place = cache or temporary_folder()
    limit = None if cache_gib is None else int(cache_gib * GIB)
    return RemoteSet(plain, Cache(place, limit, cache_shared), pin, local_ranks=local_ranks)


class RemoteSet(ShardSet):
    """Manifest and indexes are staged when it is opened and used, shards as readers ask for them.

    In the cache a set's folder is named after its manifest's hash: another version of the set is another folder.

    Args:
        url: of the set's folder.
        cache: of this node.
        digest: that the manifest must have.
    """

    def __init__(self, url: str, cache: Cache, digest: ManifestDigest | None = None, *, local_ranks: int = 1) -> None:
        self.url, self.cache, self._local_ranks = url.rstrip("/"), cache, local_ranks
        self._remote = Remote(self.url)
        self._facts = self._remote.facts
        content = self._remote.read_all(MANIFEST_NAME, MAX_MANIFEST_BYTES)
        # Nothing is staged or asked for before what the server sent has been checked.
        if digest is not None:
            digest.check(content, f"{self.url}/{MANIFEST_NAME}")
        Manifest.parse(content, f"{self.url}/{MANIFEST_NAME}")
        name = xxhash.xxh3_64_hexdigest(content)
        folder = cache.folder / set_folder(self.url, name)
        leases: list[int] = []
        weakref.finalize(self, _give_back, leases)
        self._folder, self._own_leases = folder, leases
        self._staged: set[str] = set()  # indexes that the process has staged that this set was pickled in
        self._stage_now(whole_file(MANIFEST_NAME, len(content), name))
        super().__init__(folder, manifest=content)

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to this process: the connection, and the leases, which keep files for its copies too."""
        staged = self._staged | self._indexes.keys()
        return super().__getstate__() | {"_remote": None, "_own_leases": [], "_staged": staged}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _remote=Remote(state["url"], state["_facts"]))
        weakref.finalize(self, _give_back, self._own_leases)

    def _fetch_index(self, file: str, samples: int, digest: str) -> Path:
        if file not in self._staged:
            self._stage_now(whole_file(file, index_bytes(samples), digest))
        return self.path / file

    def check_sizes(self, name: str) -> None:
        """Nothing: each file is checked, by its hash, when it is staged."""

    def files(self, files: list[StagedFile]) -> StagedFiles:
        """Files of the set, to be staged as they are needed."""
        share = int(self.cache.limit * SHARE_FOR_SHARDS) // self._local_ranks
        remote = Remote(self.url, self._facts)
        return StagedFiles(files, remote=remote, cache=self.cache, folder=self._folder, share=share)

    def _stage_now(self, file: StagedFile) -> None:
        self._own_leases.append(stage_now(file, self._remote, self.cache, self._folder))


def set_folder(url: str, digest: str) -> str:
    """The name of a set's folder in the cache: the end of its URL, as far as it is a plain name, and a digest.

    Args:
        digest: of the manifest, 16 hex digits.
    """
    last = re.split(r"[?#]", url, maxsplit=1)[0].rstrip("/").rpartition("/")[2]
    return f"{re.sub(r'[^A-Za-z0-9._-]', '_', last).lstrip('.')[:_SHOWN_OF_URL] or 'set'}-{digest}"


def _give_back(leases: list[int]) -> None:
    for lease in leases:
        os.close(lease)

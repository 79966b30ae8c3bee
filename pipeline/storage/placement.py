"""Locations of the samples of a split: in tar shards or a .beton file, on local storage or on a server."""

from __future__ import annotations

import dataclasses
import posixpath
import tarfile
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.plan import Ids
from pipeline.storage.files import LocalFiles, ShardFiles
from pipeline.storage.remote.shard_set import RemoteSet
from pipeline.storage.remote.staging import StagedFile, whole_file
from shards.errors import ShardSetError
from shards.format.dataset import ShardSet
from shards.format.index import Index
from shards.format.manifest_fields import BetonEntry, SplitEntry
from shards.format.tar import BLOCK

StoredPixels = Literal["none", "some", "all"]
"""Which samples of a split are stored as pixels instead of JPEGs."""


@dataclass(frozen=True)
class SampleLocations:
    """File, offset and size of n samples. All arrays are [n]."""

    rows: NDArray[np.void]
    """Index entries (INDEX_DTYPE: label, height, width, ...), copied."""
    files: NDArray[np.int64]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    raw: NDArray[np.bool_]
    """True: stored as pixels, uint8 [height, width, 3]; False: stored as a JPEG."""


@dataclass(frozen=True)
class Storage:
    """Index and files of a split."""

    index: Index
    """Offsets, sizes and hashes of the stored bytes (JPEGs or pixels)."""
    files: ShardFiles
    one_file: bool = False
    """Whether all shards are byte ranges of one file."""
    pixels: bool = False
    """Whether images may be stored as pixels. They are recognized by their size: JPEGs in the same file are smaller."""
    starts: NDArray[np.int64] | None = None
    """int64 [shards]: offset at which each file begins in the .beton, if the files are segments of one."""

    def locate(self, ids: Ids) -> SampleLocations:
        """Return the locations of samples, in O(len(ids))."""
        rows = self.index[ids]
        shards = rows["shard"].astype(np.int64)
        offsets, sizes = rows["offset"].astype(np.int64), rows["size"].astype(np.int64)
        if self.pixels:
            raw = sizes == rows["height"].astype(np.int64) * rows["width"] * 3
        else:
            raw = np.zeros(len(ids), np.bool_)
        return SampleLocations(
            rows=rows,
            files=np.zeros_like(shards) if self.one_file else shards,
            offsets=offsets if self.starts is None else offsets - self.starts[shards],
            sizes=sizes,
            raw=raw,
        )

    def key(self, file: int, offset: int) -> str | None:
        """Return the key of the sample at this offset, for messages; None if the file stores no keys."""
        is_tar = not self.one_file and self.starts is None
        return tar_key(self.files, file, offset) if is_tar else None


def stored_pixels(entry: SplitEntry, *, beton: bool) -> StoredPixels:
    """Return which samples are pixels in the files that `open_storage` opens with the same `beton`."""
    if entry.beton is None or (entry.tars and not beton):
        return "all" if entry.pixels else "none"
    modes: dict[str, StoredPixels] = {"jpg": "none", "smart": "some", "raw": "all"}
    return modes[entry.beton.mode]


def open_storage(dataset: ShardSet, split: str, *, beton: bool = False, max_open: int | None = None) -> Storage:
    """Open the files of a split for reading.

    Args:
        beton: prefer the .beton file if the set has both tars and a .beton.
        max_open: maximum number of open files; None: the default of `LocalFiles`.

    Raises:
        ShardSetError: the split does not exist, or its index is damaged.
    """
    entry = dataset.split(split)
    remote = dataset if isinstance(dataset, RemoteSet) else None
    if entry.tars and not (beton and entry.beton):
        index = dataset.index(split)
        files: ShardFiles
        if remote:
            files = remote.files([whole_file(shard.name, shard.bytes, shard.hash) for shard in entry.shards])
        else:
            files = LocalFiles([dataset.path / shard.name for shard in entry.shards], max_open=max_open)
        return Storage(index, files, pixels=entry.pixels)
    assert entry.beton is not None
    path = dataset.path / entry.beton.name
    # The metadata inside the .beton is not used: the index has the same values and is verified by its hash.
    index = dataset.index(split, beton=True)
    storage = Storage(index, LocalFiles([path]), one_file=True, pixels=entry.beton.mode != "jpg")
    return _in_segments(storage, split, entry.beton, remote) if remote else storage


def _in_segments(storage: Storage, split: str, beton: BetonEntry, remote: RemoteSet) -> Storage:
    """Split a remote .beton into one file per shard, so that each is staged and verified separately."""
    index = remote.complete_index(split, beton=True) if remote.restricted else storage.index
    last = index[np.searchsorted(index["shard"], np.arange(len(beton.segments)), side="right") - 1]
    ends = last["offset"].astype(np.int64) + last["size"]
    starts = np.concatenate([index["offset"][:1].astype(np.int64), ends[:-1]])
    files = [
        StagedFile(f"{beton.name}.{shard:06d}", int(end - start), digest, beton.name, int(start))
        for shard, (digest, start, end) in enumerate(zip(beton.segments, starts, ends, strict=True))
    ]
    return dataclasses.replace(storage, files=remote.files(files), one_file=False, starts=starts)


def tar_key(files: ShardFiles, file: int, offset: int) -> str | None:
    """Return the sample key from the tar header before an image; None if the header cannot be read.

    A name that is too long for the header is stored in an extended header (GNU `L`, pax `x`) before it. It is read only
    if its content fits into one block, which is nearly always the case.
    """
    offset -= offset % BLOCK  # the start of the member: pixels are preceded by the header of a PPM
    try:
        header = tarfile.TarInfo.frombuf(_block(files, file, offset - BLOCK), "utf-8", "surrogateescape")
        before = _extended_name(files, file, offset - 3 * BLOCK)
    except (ShardSetError, tarfile.HeaderError):
        return None
    folder, base = posixpath.split(before or header.name)
    return posixpath.join(folder, base.partition(".")[0])


def _extended_name(files: ShardFiles, file: int, offset: int) -> str | None:
    if offset < 0:
        return None
    try:
        header = tarfile.TarInfo.frombuf(_block(files, file, offset), "utf-8", "surrogateescape")
    except (ShardSetError, tarfile.HeaderError):
        return None
    if header.size > BLOCK or header.type not in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
        return None
    content = _block(files, file, offset + BLOCK)[: header.size].decode("utf-8", "surrogateescape")
    if header.type == tarfile.GNUTYPE_LONGNAME:
        return content.rstrip("\0")
    records = (line.partition(" ")[2].partition("=") for line in content.split("\n"))
    return next((value for key, _, value in records if key == "path"), None)


def _block(files: ShardFiles, file: int, offset: int) -> bytes:
    block = np.empty(BLOCK, np.uint8)
    files.read(file, block, offset)
    return block.tobytes()

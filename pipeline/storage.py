"""Where the samples of a split are stored: as files in tars, or as images of a .beton."""

from __future__ import annotations

import posixpath
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.files import MAX_OPEN, LocalFiles, ShardFiles
from pipeline.plan import Ids
from shards.beton import FIELD, HEADER, METADATA, VERSION
from shards.dataset import ShardSet
from shards.errors import ShardSetError
from shards.index import Index
from shards.tar import BLOCK

RAW = 1  # FFCV's mode of an image that is stored as pixels


@dataclass(frozen=True)
class Places:
    """Where n samples are stored, and what is known of their bytes. All arrays are [n]."""

    rows: NDArray[np.void]
    """INDEX_DTYPE: label, height, width and the rest, copied from the index."""
    files: NDArray[np.int64]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    raw: NDArray[np.bool_]
    """Stored as pixels, uint8 [height, width, 3], not as a JPEG."""
    hashed: NDArray[np.bool_]
    """Whether the index's hash is of these bytes."""


class Storage(Protocol):
    """The stored samples of a split."""

    files: ShardFiles
    samples: int

    def locate(self, ids: Ids) -> Places:
        """Find samples; O(len(ids))."""
        ...

    def key(self, file: int, offset: int) -> str | None:
        """The name of the sample whose bytes begin there, for messages; None where it has none."""
        ...


class IndexedStorage:
    """A split that is read where the index says: in tars, or as JPEGs of a .beton that has no tars beside it."""

    def __init__(self, index: Index, files: ShardFiles, *, single_file: bool = False) -> None:
        self.files, self.samples = files, len(index)
        self._index, self._single_file = index, single_file

    def locate(self, ids: Ids) -> Places:
        rows = self._index[ids]
        n = len(ids)
        return Places(
            rows=rows,
            files=np.zeros(n, np.int64) if self._single_file else rows["shard"].astype(np.int64),
            offsets=rows["offset"].astype(np.int64),
            sizes=rows["size"].astype(np.int64),
            raw=np.zeros(n, np.bool_),
            hashed=np.ones(n, np.bool_),
        )

    def key(self, file: int, offset: int) -> str | None:
        return None if self._single_file else tar_key(self.files, file, offset)


class BetonStorage:
    """A split as one .beton; what it stores of each image, and where, stands in its own metadata.

    Args:
        path: of the .beton, for its metadata, which is mapped.
        own_index: the index describes what the .beton stores, not the tars beside it.

    Raises:
        ShardSetError: the file is no .beton of these samples.
    """

    def __init__(self, index: Index, files: ShardFiles, path: Path, *, own_index: bool) -> None:
        self.files, self.samples = files, len(index)
        self._index, self._own_index = index, own_index
        self._images = _metadata(path, len(index))

    def locate(self, ids: Ids) -> Places:
        rows, images = self._index[ids], self._images[ids]["image"]
        raw = images["mode"] == RAW
        pixels = images["height"].astype(np.int64) * images["width"] * 3
        return Places(
            rows=rows,
            files=np.zeros(len(ids), np.int64),
            offsets=images["data_ptr"].astype(np.int64),
            sizes=np.where(raw, pixels, rows["size"].astype(np.int64)),
            raw=raw,
            hashed=np.ones(len(ids), np.bool_) if self._own_index else ~raw,
        )

    def key(self, file: int, offset: int) -> str | None:
        return None


def storage_of(dataset: ShardSet, split: str, *, beton: bool = False, max_open: int = MAX_OPEN) -> Storage:
    """The stored samples of a local set.

    Args:
        beton: read the .beton, if there is one, even where there are tars.
        max_open: file descriptors to hold.

    Raises:
        ShardSetError: no such split, a damaged index or .beton, or pixels where JPEGs are wanted.
    """
    entry, index = dataset.split(split), dataset.index(split)
    if beton and entry.beton is not None:
        path = dataset.path / entry.beton.name
        return BetonStorage(index, LocalFiles([path]), path, own_index=not entry.tars)
    if entry.tars:
        paths = [dataset.path / shard.name for shard in entry.shards]
        return IndexedStorage(index, LocalFiles(paths, max_open=max_open))
    assert entry.beton is not None
    if entry.beton.mode != "jpg":
        raise ShardSetError(
            f"{dataset.path / entry.beton.name}: stores pixels (mode {entry.beton.mode}), which the FFCV loader alone "
            "reads: use --loader ffcv"
        )
    return IndexedStorage(index, LocalFiles([dataset.path / entry.beton.name]), single_file=True)


def tar_key(files: ShardFiles, file: int, offset: int) -> str | None:
    """The name in the tar header before a member's bytes; None where there is no readable one.

    A name too long for its header stands in full in an extended header (GNU `L`, pax `x`) two blocks before: taken
    when that is one block of content, as it nearly always is.
    """
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


def _metadata(path: Path, samples: int) -> NDArray[np.void]:
    """The metadata of every sample of a .beton, METADATA [samples], mapped."""
    try:
        header = np.fromfile(path, HEADER, count=1)
        at = HEADER.itemsize + 2 * FIELD.itemsize
        if len(header) != 1 or (header["version"][0], header["fields"][0]) != (VERSION, 2):
            raise ShardSetError(f"{path}: no .beton of this version; make it again with 'pipeline shard'")
        if header["samples"][0] != samples:
            raise ShardSetError(
                f"{path}: {samples} samples expected by the manifest, {header['samples'][0]} found; copy it again"
            )
        return np.memmap(path, METADATA, mode="r", offset=at, shape=(samples,))
    except FileNotFoundError:
        raise ShardSetError(f"{path}: missing; copy it again, or run 'pipeline verify' on the set") from None
    except (OSError, ValueError) as error:
        raise ShardSetError(f"{path}: cannot be read ({error}); copy it again") from error

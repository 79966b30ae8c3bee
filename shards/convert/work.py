"""The work folder of a conversion: what was decided at its start, and which shards are done.

Everything in it is published by rename, so whatever is there is whole unless a disk or a person damaged it: all of it
carries hashes. What can be made again from the source then is; the folder goes when the manifest is written.

It also identifies the files that this project created; other files of the same names are never replaced.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import stat
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray
from pydantic import TypeAdapter

from shards.errors import ConversionFailed, UserError
from shards.files.durable import TEMPORARY, durable_write, is_temporary, save_array, sync_folder
from shards.files.regular import read_bounded
from shards.format.beton import BetonOptions
from shards.format.index import INDEX_DTYPE, Index, write_index
from shards.format.manifest import ClassEntry
from shards.format.tar import BLOCK, END, header
from shards.schema import Count, Digest, parse_json
from shards.sources.listing import Listing
from shards.sources.scan import Layout
from shards.sources.unused import UnusedEntry
from shards.sources.walk import WORK_FOLDER

MARKER = "pipeline-work-folder"
"""The first file in a work folder. A folder without it was not created by this project."""
MAX_RECORD = 2**28
"""Bytes of a JSON file of the work folder."""
_WRITTEN = r"(train|val|test)(-\d{6}\.(tar|idx)|(\.beton)?\.index\.npy|\.beton)|dataset\.json|rejects\.jsonl"
_CHUNK = 2**22

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ShardDone:
    """What is recorded of a finished shard."""

    samples: Count
    bytes: Count
    hash: Digest
    repaired: dict[str, Count]
    """Reason -> images."""
    rejected: list[tuple[str, str]]
    """Name and reason of each image left out."""
    blank: Count = 0
    """Images that are nearly black or of a single colour."""
    rewritten: Count = 0
    """Files that were written to between listing and reading, with the same size."""
    rows_hash: str = ""
    """xxh3-64 of the file of rows, set when it is saved."""


@dataclass(frozen=True, kw_only=True)
class SegmentDone:
    """What is recorded of a shard's part of a .beton."""

    hash: Digest
    rows_hash: Digest
    """xxh3-64 of the file of rows."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """A file of the set, recorded before it gets its name."""

    bytes: Count
    hash: Digest | None
    """None for a .beton, which takes long to read."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a conversion decided before it opened the first image."""

    tool: str
    """Name and version; another may not give the same bytes."""
    options: dict[str, Any]
    """Everything that changes bytes; a resumed conversion must be asked for the same."""
    source: str
    """Absolute path, printable."""
    layout: Layout
    digest: Digest
    """Tells the source from others, and from itself after it has changed (`shards.sources.identity`)."""
    classes: tuple[ClassEntry, ...]
    shards: dict[str, Count]
    """Split -> number of shards."""
    unused: tuple[UnusedEntry, ...]
    notes: tuple[str, ...]
    doubts: tuple[str, ...]
    folders: dict[str, int]
    """Folder above those that hold images or archives, percent-encoded -> time of its last change, in seconds since
    1970."""
    source_files: dict[str, Digest]
    """Parquet file below the source -> its digest."""
    files: dict[str, Digest]
    """Name in the work folder -> xxh3-64 of the files of the listing."""

    @property
    def keeps_tars(self) -> bool:
        return bool(self.options["format"] != "ffcv")

    @property
    def beton(self) -> BetonOptions | None:
        """None when no .beton is asked for."""
        return BetonOptions(**self.options["beton"]) if self.options["beton"] else None

    @property
    def jobs(self) -> list[tuple[str, int]]:
        """(split, shard), in order."""
        return [(split, i) for split, n in self.shards.items() for i in range(n)]


_PLAN, _SHARD = TypeAdapter(Plan), TypeAdapter(ShardDone)
_SEGMENT, _PUBLISHED = TypeAdapter(SegmentDone), TypeAdapter(Published)


class Work:
    """The work folder inside the set that is being made."""

    def __init__(self, out: Path, keeps_tars: bool = True) -> None:
        self.out, self.keeps_tars = out, keeps_tars
        self.path = out / WORK_FOLDER

    # -- the folder

    def make(self) -> None:
        """Make the folder, or take the one that an earlier start left.

        Raises:
            UserError: another folder or file has this name.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise self._foreign_file(self.path, "a file") from None
        # In this order: of several processes that begin together, another may be making the marker.
        empty = next(self.path.iterdir(), None) is None
        if not empty and not self.is_ours():
            raise self._foreign_file(self.path, f"a folder without {MARKER} in it")
        (self.path / MARKER).touch()
        sync_folder(self.path)

    def is_ours(self) -> bool:
        """Whether the work folder is there, and was made by `make`."""
        return stat.S_ISREG(_mode(self.path / MARKER))

    def close(self) -> None:
        """Remove the work folder, and what killed processes left half-written beside it. The set is complete."""
        if self.is_ours():
            _remove(path for path in self.out.glob(f".*{TEMPORARY}") if is_temporary(path.name, _WRITTEN))
            # The marker goes last, so that the folder is still recognised if this is killed.
            for path in self.path.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                elif path.name != MARKER:
                    path.unlink(missing_ok=True)
            (self.path / MARKER).unlink(missing_ok=True)
        with suppress(OSError):
            self.path.rmdir()

    def remove_temporary(self, split: str, shard: int) -> None:
        """Remove what a killed process left half-written of a shard."""
        begin = f".{split}-{shard:06d}."
        _remove(path for path in self.out.glob(f"{begin}*{TEMPORARY}") if is_temporary(path.name, _WRITTEN))
        _remove(self.path.glob(f"{begin}*{TEMPORARY}"))

    def begin_scan(self, key: str) -> Path:
        """Return the folder for what a scan unpacks; what one of another key left there is removed.

        Args:
            key: everything that decides what the scan unpacks.
        """
        spool, record = self.path / "spool", self.path / "scan.key"
        try:
            same = read_bounded(record, MAX_RECORD) == key.encode()
        except FileNotFoundError:
            same = False
        if not same:
            if spool.exists():
                shutil.rmtree(spool)
            durable_write(record, key.encode())
        return spool

    def scan_time(self) -> float:
        """Return when the scan began, by the clock of the work folder's file system, in seconds since 1970; or 0."""
        try:
            return (self.path / "scan.key").stat().st_mtime
        except FileNotFoundError:
            return 0.0

    # -- whose files

    def refuse_foreign(self, names: Iterable[str]) -> None:
        """Check that existing files of these names were created by this project and may be replaced.

        Raises:
            UserError: one is not what was recorded before it was published.
        """
        for name in names:
            path = self.out / name
            if _mode(path) and not self._owns(path):
                raise self._foreign_file(path, "not written by this command")

    def refuse_foreign_shards(self, split: str, shards: Iterable[int]) -> None:
        """Check that existing tars and .idx files were created by this project from images of these shards.

        Raises:
            UserError: one is not.
        """
        for shard in shards if self.keeps_tars else ():
            tar = self.tar(split, shard)
            for path, begins_so in ((tar, _is_tar_of), (tar.with_suffix(".idx"), _is_index_of)):
                if not _mode(path):
                    continue
                listing, bounds = self.load_listing(split)
                keys = {entry.key for entry in listing.entries(int(bounds[shard]), int(bounds[shard + 1]))}
                if not stat.S_ISREG(_mode(path)) or not begins_so(path, keys):
                    raise self._foreign_file(path, "not written by this command")

    def publish(self, name: str, content: bytes) -> str:
        """Write a file of the set, and replace an earlier one of this project; return its xxh3-64, 16 hex digits.

        Raises:
            UserError: a file of this name exists that this project did not create.
        """
        self.refuse_foreign([name])
        digest = xxhash.xxh3_64_hexdigest(content)
        self._claim(name, len(content), digest)
        durable_write(self.out / name, content)
        return digest

    def publish_file(self, finished: Path, name: str, digest: str | None) -> None:
        """Give a finished file in the work folder its name in the set; otherwise as `publish`."""
        self.refuse_foreign([name])
        self._claim(name, finished.stat().st_size, digest)
        finished.rename(self.out / name)
        sync_folder(self.out)

    def has_published(self) -> bool:
        """Whether a file of the set was published."""
        return next(self.path.glob("*.published"), None) is not None

    def publish_index(self, name: str, samples: int, shards: Iterable[Index]) -> str:
        """Write an index of `samples` rows from those of its shards, as `publish`; returns its xxh3-64."""
        digest = write_index(self.path / name, samples, shards)
        self.publish_file(self.path / name, name, digest)
        return digest

    def withdraw(self, name: str) -> None:
        """Remove a file that an earlier start published, if any.

        Raises:
            UserError: a file of this name exists that this project did not create.
        """
        self.refuse_foreign([name])
        (self.out / name).unlink(missing_ok=True)

    def _claim(self, name: str, size: int, digest: str | None) -> None:
        self._save(f"{name}.published", _PUBLISHED, Published(bytes=size, hash=digest))

    def _owns(self, path: Path) -> bool:
        record = self._load(f"{path.name}.published", _PUBLISHED)
        if record is None or not stat.S_ISREG(_mode(path)) or path.stat().st_size != record.bytes:
            return False
        return record.hash is None or hash_file(path) == record.hash

    def _foreign_file(self, path: Path, fact: str) -> UserError:
        return UserError(f"{path}: {fact}, so it is left alone; move it away, or choose another folder for the set")

    # -- the plan

    def save_plan(self, plan: Plan) -> None:
        """The last thing that a scan writes."""
        self._save("plan.json", _PLAN, plan)

    def load_plan(self) -> Plan | None:
        """The plan; None where none was made yet.

        Raises:
            UserError: it is damaged.
        """
        if not self.is_ours() or not _mode(self.path / "plan.json"):
            return None
        plan = self._load("plan.json", _PLAN)
        if plan is None:
            raise self._damaged("plan.json")
        return plan

    def check_listing(self, plan: Plan) -> None:
        """Compare the files of the listing with what was written; once in a start, before processes map them.

        Raises:
            UserError: one is missing or damaged.
        """
        for name, digest in plan.files.items():
            with suppress(FileNotFoundError):
                if hash_file(self.path / name) == digest:
                    continue
            raise self._damaged(name)

    def _damaged(self, name: str) -> UserError:
        return UserError(f"{self.path / name}: damaged; remove the unfinished set {self.out} and start again")

    def save_listing(self, split: str, listing: Listing, bounds: NDArray[np.int64]) -> dict[str, str]:
        """Write a split's listing; returns name -> hash of its files."""
        places = self.path / f"{split}.bounds.npy"
        save_array(places, bounds)
        return {path.name: hash_file(path) for path in (*listing.save(self.path / f"{split}.listing"), places)}

    def load_listing(self, split: str) -> tuple[Listing, NDArray[np.int64]]:
        return Listing.load(self.path / f"{split}.listing"), np.load(self.path / f"{split}.bounds.npy", mmap_mode="r")

    # -- shards

    def tar(self, split: str, shard: int) -> Path:
        """A shard's tar; in the work folder where the set is to be a .beton alone."""
        return (self.out if self.keeps_tars else self.path) / f"{split}-{shard:06d}.tar"

    def save_done(self, split: str, shard: int, done: ShardDone, rows: Index) -> None:
        """Record a shard as finished, after its files are in place."""
        rows_hash = self._save_rows(_name(split, shard, "rows.npy"), rows)
        self._save(_name(split, shard, "json"), _SHARD, replace(done, rows_hash=rows_hash))

    def is_done(self, split: str, shard: int) -> bool:
        """Whether the shard is recorded, and what is recorded is there and whole (of a tar: there, with its size)."""
        done = self._load(_name(split, shard, "json"), _SHARD)
        if done is None or self._load_rows(_name(split, shard, "rows.npy"), done.rows_hash) is None:
            return False
        if not self.keeps_tars:
            return self.is_in_beton(split, shard) or _size(self.tar(split, shard)) == done.bytes
        tar = self.tar(split, shard)
        return _size(tar) == done.bytes and _size(tar.with_suffix(".idx")) is not None

    def load_done(self, split: str, shard: int) -> ShardDone:
        return self._need(self._load(_name(split, shard, "json"), _SHARD), _name(split, shard, "json"))

    def load_rows(self, split: str, shard: int) -> Index:
        name = _name(split, shard, "rows.npy")
        return self._need(self._load_rows(name, self.load_done(split, shard).rows_hash), name)

    def index(self, split: str) -> Path:
        """The split's index."""
        return self.out / f"{split}.index.npy"

    # -- betons

    def beton(self, split: str) -> Path:
        return self.out / f"{split}.beton"

    def beton_index(self, split: str) -> Path:
        """The index of what the .beton stores: the split's own where no tars are kept."""
        return self.out / f"{split}.beton.index.npy" if self.keeps_tars else self.index(split)

    def unfinished_beton(self, split: str) -> Path:
        return self.path / f"{split}.beton"

    def save_segment(self, split: str, shard: int, digest: str, rows: Index) -> None:
        """Record a shard's part of the .beton as filled."""
        rows_hash = self._save_rows(_name(split, shard, "beton.npy"), rows)
        self._save(_name(split, shard, "beton"), _SEGMENT, SegmentDone(hash=digest, rows_hash=rows_hash))

    def load_segment(self, split: str, shard: int) -> tuple[str, Index]:
        """The part's hash, and the rows with offset, size and hash of what it holds."""
        done = self._need(self._load(_name(split, shard, "beton"), _SEGMENT), _name(split, shard, "beton"))
        name = _name(split, shard, "beton.npy")
        return done.hash, self._need(self._load_rows(name, done.rows_hash), name)

    def is_in_beton(self, split: str, shard: int) -> bool:
        """Whether the shard's part is recorded as filled, and the .beton is there."""
        done = self._load(_name(split, shard, "beton"), _SEGMENT)
        if done is None or self._load_rows(_name(split, shard, "beton.npy"), done.rows_hash) is None:
            return False
        return self.beton(split).exists() or self.unfinished_beton(split).exists()

    # -- records: JSON with a hash of all the rest of it, and rows whose hash stands in one

    def _save(self, name: str, schema: TypeAdapter[T], record: T) -> None:
        content = schema.dump_python(record, mode="json")
        digest = xxhash.xxh3_64_hexdigest(_dumps(content))
        durable_write(self.path / name, _dumps({"content": content, "digest": digest}))

    def _load(self, name: str, schema: TypeAdapter[T]) -> T | None:
        """A record; None where it is missing or damaged."""
        try:
            document = json.loads(read_bounded(self.path / name, MAX_RECORD))
            content = _dumps(document["content"])
            if document["digest"] != xxhash.xxh3_64_hexdigest(content):
                return None
            return parse_json(content, schema, limit=MAX_RECORD)
        except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, LookupError, RecursionError):
            return None

    def _save_rows(self, name: str, rows: Index) -> str:
        out = io.BytesIO()
        np.save(out, rows, allow_pickle=False)
        durable_write(self.path / name, out.getvalue())
        return xxhash.xxh3_64_hexdigest(out.getvalue())

    def _load_rows(self, name: str, digest: str) -> Index | None:
        """`INDEX_DTYPE` [samples]; None where they are missing or damaged."""
        try:
            content = (self.path / name).read_bytes()
        except FileNotFoundError:
            return None
        if xxhash.xxh3_64_hexdigest(content) != digest:
            return None
        rows: Index = np.load(io.BytesIO(content), allow_pickle=False)
        assert rows.dtype == INDEX_DTYPE
        return rows

    def _need(self, found: T | None, name: str) -> T:
        if found is None:
            raise ConversionFailed(f"{self.path / name}: missing or damaged; run the same command: it makes it again")
        return found


def hash_file(path: Path) -> str:
    """xxh3-64 of a file, 16 hex digits."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _is_tar_of(path: Path, keys: set[str]) -> bool:
    """Whether a tar begins as `SampleTar` writes it, with an image of one of these keys."""
    with path.open("rb") as file:
        head = file.read(BLOCK)
    name = head[:100].rstrip(b"\0").decode("latin-1")
    size = head[124:135]
    if not name:
        return path.stat().st_size == len(END) and head == bytes(BLOCK)  # all of its images were rejected
    return name.removesuffix(".jpg") in keys and size.isdigit() and head == header(name, int(size, 8))


def _is_index_of(path: Path, keys: set[str]) -> bool:
    """Whether a .idx file begins as `dali_index` writes it, with an image of one of these keys."""
    with path.open("rb") as file:
        first, second = (file.readline(2 * BLOCK).decode("latin-1").split() for _ in range(2))
    if first == ["v1.2", "0"]:
        return True
    return first[:1] == ["v1.2"] and len(second) == 8 and second[3].removesuffix(".jpg") in keys


def _name(split: str, shard: int, suffix: str) -> str:
    return f"{split}-{shard:06d}.{suffix}"


def _dumps(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True).encode()


def _mode(path: Path) -> int:
    """`st_mode`, of a link itself; 0 where there is nothing."""
    try:
        return os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0


def _size(path: Path) -> int | None:
    """Bytes of a regular file; None where there is none."""
    status = path.lstat() if _mode(path) else None
    return status.st_size if status and stat.S_ISREG(status.st_mode) else None


def _remove(leftovers: Iterable[Path]) -> None:
    for leftover in leftovers:
        leftover.unlink(missing_ok=True)

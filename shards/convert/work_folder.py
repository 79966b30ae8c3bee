"""The work folder of a conversion: what was decided at its start, and which shards are done.

Everything in it is published by rename, so whatever is there is whole unless a disk or a person damaged it: all of it
carries hashes. What can be made again from the source then is; the folder goes when the manifest is written.

It also identifies the files that this project created; other files of the same names are never replaced.
"""

from __future__ import annotations

import shutil
import stat
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from shards.convert.conversion_plan import ConversionPlan
from shards.convert.published_files import PublishedFiles, foreign_file, is_index_of, is_tar_of, mode_of, size_of
from shards.convert.records import (
    MAX_RECORD,
    SegmentDone,
    ShardDone,
    hash_file,
    load_record,
    load_rows,
    save_record,
    save_rows,
)
from shards.errors import ConversionFailed, UserError
from shards.files.durable import TEMPORARY, durable_write, is_temporary, save_array, sync_folder
from shards.files.regular import read_bounded
from shards.format.index import Index
from shards.sources.listing import Listing
from shards.sources.walk import WORK_FOLDER

MARKER = "pipeline-work-folder"
"""The first file in a work folder. A folder without it was not created by this project."""
_WRITTEN = r"(train|val|test)(-\d{6}\.(tar|idx)|(\.beton)?\.index\.npy|\.beton)|dataset\.json|rejects\.jsonl"

T = TypeVar("T")


_PLAN, _SHARD = TypeAdapter(ConversionPlan), TypeAdapter(ShardDone)
_SEGMENT = TypeAdapter(SegmentDone)


class WorkFolder(PublishedFiles):
    """The work folder inside the set that is being made."""

    def __init__(self, out: Path, keeps_tars: bool = True) -> None:
        super().__init__(out, out / WORK_FOLDER)
        self.keeps_tars = keeps_tars

    # -- the folder

    def create(self) -> None:
        """Make the folder, or take the one that an earlier start left.

        Raises:
            UserError: another folder or file has this name.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise foreign_file(self.path, "a file") from None
        # In this order: of several processes that begin together, another may be making the marker.
        empty = next(self.path.iterdir(), None) is None
        if not empty and not self.is_ours():
            raise foreign_file(self.path, f"a folder without {MARKER} in it")
        (self.path / MARKER).touch()
        sync_folder(self.path)

    def is_ours(self) -> bool:
        """Whether the work folder is there, and was created by `create`."""
        return stat.S_ISREG(mode_of(self.path / MARKER))

    def remove(self) -> None:
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

    def reject_foreign_shards(self, split: str, shards: Iterable[int]) -> None:
        """Check that existing tars and .idx files were created by this project from images of these shards.

        Raises:
            UserError: one is not.
        """
        for shard in shards if self.keeps_tars else ():
            tar = self.tar(split, shard)
            for path, begins_so in ((tar, is_tar_of), (tar.with_suffix(".idx"), is_index_of)):
                if not mode_of(path):
                    continue
                listing, bounds = self.load_listing(split)
                keys = {entry.key for entry in listing.entries(int(bounds[shard]), int(bounds[shard + 1]))}
                if not stat.S_ISREG(mode_of(path)) or not begins_so(path, keys):
                    raise foreign_file(path, "not written by this command")

    # -- the plan

    def save_plan(self, plan: ConversionPlan) -> None:
        """The last thing that a scan writes."""
        save_record(self.path / "plan.json", _PLAN, plan)

    def load_plan(self) -> ConversionPlan | None:
        """The plan; None where none was made yet.

        Raises:
            UserError: it is damaged.
        """
        if not self.is_ours() or not mode_of(self.path / "plan.json"):
            return None
        plan = load_record(self.path / "plan.json", _PLAN)
        if plan is None:
            raise self._damaged("plan.json")
        return plan

    def check_listing(self, plan: ConversionPlan) -> None:
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
        rows_hash = save_rows(self._shard_file(split, shard, "rows.npy"), rows)
        save_record(self._shard_file(split, shard, "json"), _SHARD, replace(done, rows_hash=rows_hash))

    def is_done(self, split: str, shard: int) -> bool:
        """Whether the shard is recorded, and what is recorded is there and whole (of a tar: there, with its size)."""
        done = load_record(self._shard_file(split, shard, "json"), _SHARD)
        if done is None or load_rows(self._shard_file(split, shard, "rows.npy"), done.rows_hash) is None:
            return False
        if not self.keeps_tars:
            return self.is_in_beton(split, shard) or size_of(self.tar(split, shard)) == done.bytes
        tar = self.tar(split, shard)
        return size_of(tar) == done.bytes and size_of(tar.with_suffix(".idx")) is not None

    def load_done(self, split: str, shard: int) -> ShardDone:
        path = self._shard_file(split, shard, "json")
        return _required(load_record(path, _SHARD), path)

    def load_rows(self, split: str, shard: int) -> Index:
        path = self._shard_file(split, shard, "rows.npy")
        return _required(load_rows(path, self.load_done(split, shard).rows_hash), path)

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
        rows_hash = save_rows(self._shard_file(split, shard, "beton.npy"), rows)
        save_record(self._shard_file(split, shard, "beton"), _SEGMENT, SegmentDone(hash=digest, rows_hash=rows_hash))

    def load_segment(self, split: str, shard: int) -> tuple[str, Index]:
        """The part's hash, and the rows with offset, size and hash of what it holds."""
        record, rows = (self._shard_file(split, shard, suffix) for suffix in ("beton", "beton.npy"))
        done = _required(load_record(record, _SEGMENT), record)
        return done.hash, _required(load_rows(rows, done.rows_hash), rows)

    def is_in_beton(self, split: str, shard: int) -> bool:
        """Whether the shard's part is recorded as filled, and the .beton is there."""
        done = load_record(self._shard_file(split, shard, "beton"), _SEGMENT)
        if done is None or load_rows(self._shard_file(split, shard, "beton.npy"), done.rows_hash) is None:
            return False
        return self.beton(split).exists() or self.unfinished_beton(split).exists()

    def _shard_file(self, split: str, shard: int, suffix: str) -> Path:
        return self.path / f"{split}-{shard:06d}.{suffix}"


def _required(found: T | None, path: Path) -> T:
    """Return what was loaded from a file.

    Raises:
        ConversionFailed: it is missing or damaged.
    """
    if found is None:
        raise ConversionFailed(f"{path}: missing or damaged; run the same command: it makes it again")
    return found


def _remove(leftovers: Iterable[Path]) -> None:
    for leftover in leftovers:
        leftover.unlink(missing_ok=True)

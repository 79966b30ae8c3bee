"""The work folder of a conversion: the conversion plan, the listing, and records of the finished shards.

All files are written atomically and carry hashes, so later damage is detected. A shard with a damaged record is
written again from the source. The folder is removed when the manifest is written.

It also records which files this project created; other files with the same names are never replaced.
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
"""First file that is created in a work folder. A folder without it was not created by this project."""
_WRITTEN = r"(train|val|test)(-\d{6}\.(tar|idx)|(\.beton)?\.index\.npy|\.beton)|dataset\.json|rejects\.jsonl"

T = TypeVar("T")


_PLAN, _SHARD = TypeAdapter(ConversionPlan), TypeAdapter(ShardDone)
_SEGMENT = TypeAdapter(SegmentDone)


class WorkFolder(PublishedFiles):
    """The work folder inside the folder of an unfinished set.

    Args:
        out: folder of the set.
        keeps_tars: whether the set contains tars, not only .beton files.
    """

    def __init__(self, out: Path, keeps_tars: bool = True) -> None:
        super().__init__(out, out / WORK_FOLDER)
        self.keeps_tars = keeps_tars

    # -- the folder

    def create(self) -> None:
        """Create the folder, or reuse the one of an interrupted conversion.

        Raises:
            UserError: a file, or a folder that this project did not create, has this name.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise foreign_file(self.path, "is a file") from None
        # Check for files first, because a process that started at the same time may create the marker in between.
        empty = next(self.path.iterdir(), None) is None
        if not empty and not self.is_valid():
            raise foreign_file(self.path, f"is a folder without {MARKER} in it")
        (self.path / MARKER).touch()
        sync_folder(self.path)

    def is_valid(self) -> bool:
        """Return whether the work folder exists and was created by this project."""
        return stat.S_ISREG(mode_of(self.path / MARKER))

    def remove(self) -> None:
        """Remove the work folder and the temporary files of killed processes in the set."""
        if self.is_valid():
            _remove(path for path in self.out.glob(f".*{TEMPORARY}") if is_temporary(path.name, _WRITTEN))
            # The marker is removed last, so that the folder is still recognized if this process is killed.
            for path in self.path.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                elif path.name != MARKER:
                    path.unlink(missing_ok=True)
            (self.path / MARKER).unlink(missing_ok=True)
        with suppress(OSError):
            self.path.rmdir()

    def remove_temporary(self, split: str, shard: int) -> None:
        """Remove the temporary files of a killed process that was writing a shard."""
        begin = f".{split}-{shard:06d}."
        _remove(path for path in self.out.glob(f"{begin}*{TEMPORARY}") if is_temporary(path.name, _WRITTEN))
        _remove(self.path.glob(f"{begin}*{TEMPORARY}"))

    def begin_scan(self, key: str) -> Path:
        """Return the folder for files that a scan unpacks. Files of a scan with a different key are removed.

        Args:
            key: everything on which the unpacked files depend.
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
        """Return the start time of the scan in seconds since 1970, by the file system's clock; 0 if unknown."""
        try:
            return (self.path / "scan.key").stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def reject_foreign_shards(self, split: str, shards: Iterable[int]) -> None:
        """Check that existing tars and .idx files were created by this project from images of these shards.

        Raises:
            UserError: a file was created by another program or from other images.
        """
        for shard in shards if self.keeps_tars else ():
            tar = self.tar(split, shard)
            for path, was_written_by_us in ((tar, is_tar_of), (tar.with_suffix(".idx"), is_index_of)):
                if not mode_of(path):
                    continue
                listing, bounds = self.load_listing(split)
                keys = {entry.key for entry in listing.entries(int(bounds[shard]), int(bounds[shard + 1]))}
                if not stat.S_ISREG(mode_of(path)) or not was_written_by_us(path, keys):
                    raise foreign_file(path, "was not written by this command")

    # -- the plan

    def save_plan(self, plan: ConversionPlan) -> None:
        """Save the plan. It is the last file that a scan writes."""
        save_record(self.path / "plan.json", _PLAN, plan)

    def load_plan(self) -> ConversionPlan | None:
        """Load the plan; return None if there is none yet.

        Raises:
            UserError: the plan is damaged.
        """
        if not self.is_valid() or not mode_of(self.path / "plan.json"):
            return None
        plan = load_record(self.path / "plan.json", _PLAN)
        if plan is None:
            raise self._damaged("plan.json")
        return plan

    def check_listing(self, plan: ConversionPlan) -> None:
        """Check the hashes of the listing's files, once per run, before worker processes memory-map them.

        Raises:
            UserError: a file is missing or damaged.
        """
        for name, digest in plan.files.items():
            with suppress(FileNotFoundError):
                if hash_file(self.path / name) == digest:
                    continue
            raise self._damaged(name)

    def _damaged(self, name: str) -> UserError:
        return UserError(f"{self.path / name}: damaged; remove the unfinished set {self.out}, then start again")

    def save_listing(self, split: str, listing: Listing, bounds: NDArray[np.int64]) -> dict[str, str]:
        """Write a split's listing and shard bounds; return name -> hash of the written files."""
        bounds_file = self.path / f"{split}.bounds.npy"
        save_array(bounds_file, bounds)
        return {path.name: hash_file(path) for path in (*listing.save(self.path / f"{split}.listing"), bounds_file)}

    def load_listing(self, split: str) -> tuple[Listing, NDArray[np.int64]]:
        """Return the shuffled listing of a split, and its shard bounds int64 [shards + 1]."""
        return Listing.load(self.path / f"{split}.listing"), np.load(self.path / f"{split}.bounds.npy", mmap_mode="r")

    # -- shards

    def tar(self, split: str, shard: int) -> Path:
        """Return the path of a shard's tar: in the set, or in the work folder if the set has only .beton files."""
        return (self.out if self.keeps_tars else self.path) / f"{split}-{shard:06d}.tar"

    def save_done(self, split: str, shard: int, done: ShardDone, rows: Index) -> None:
        """Record a shard as finished, after its files are written."""
        rows_hash = save_rows(self._shard_file(split, shard, "rows.npy"), rows)
        save_record(self._shard_file(split, shard, "json"), _SHARD, replace(done, rows_hash=rows_hash))

    def is_done(self, split: str, shard: int) -> bool:
        """Return whether the shard is recorded as finished, its record is intact and its tar has the recorded size."""
        done = load_record(self._shard_file(split, shard, "json"), _SHARD)
        if done is None or load_rows(self._shard_file(split, shard, "rows.npy"), done.rows_hash) is None:
            return False
        if not self.keeps_tars:
            return self.is_segment_done(split, shard) or size_of(self.tar(split, shard)) == done.bytes
        tar = self.tar(split, shard)
        return size_of(tar) == done.bytes and size_of(tar.with_suffix(".idx")) is not None

    def load_done(self, split: str, shard: int) -> ShardDone:
        path = self._shard_file(split, shard, "json")
        return _require(load_record(path, _SHARD), path)

    def load_rows(self, split: str, shard: int) -> Index:
        path = self._shard_file(split, shard, "rows.npy")
        return _require(load_rows(path, self.load_done(split, shard).rows_hash), path)

    def index(self, split: str) -> Path:
        """Return the path of the split's index."""
        return self.out / f"{split}.index.npy"

    # -- .beton files

    def beton(self, split: str) -> Path:
        return self.out / f"{split}.beton"

    def beton_index(self, split: str) -> Path:
        """Return the path of the .beton's index, which is the split's index if the set has no tars."""
        return self.out / f"{split}.beton.index.npy" if self.keeps_tars else self.index(split)

    def unfinished_beton(self, split: str) -> Path:
        return self.path / f"{split}.beton"

    def save_segment(self, split: str, shard: int, digest: str, rows: Index) -> None:
        """Record a shard's segment of the .beton as written."""
        rows_hash = save_rows(self._shard_file(split, shard, "beton.npy"), rows)
        save_record(self._shard_file(split, shard, "beton"), _SEGMENT, SegmentDone(hash=digest, rows_hash=rows_hash))

    def load_segment(self, split: str, shard: int) -> tuple[str, Index]:
        """Return the segment's hash and its index rows, with the offsets, sizes and hashes of the stored images."""
        record, rows = (self._shard_file(split, shard, suffix) for suffix in ("beton", "beton.npy"))
        done = _require(load_record(record, _SEGMENT), record)
        return done.hash, _require(load_rows(rows, done.rows_hash), rows)

    def is_segment_done(self, split: str, shard: int) -> bool:
        """Return whether the shard's segment is recorded as written, and the .beton exists."""
        done = load_record(self._shard_file(split, shard, "beton"), _SEGMENT)
        if done is None or load_rows(self._shard_file(split, shard, "beton.npy"), done.rows_hash) is None:
            return False
        return self.beton(split).exists() or self.unfinished_beton(split).exists()

    def _shard_file(self, split: str, shard: int, suffix: str) -> Path:
        return self.path / f"{split}-{shard:06d}.{suffix}"


def _require(found: T | None, path: Path) -> T:
    """Return `found`, which was loaded from `path`.

    Raises:
        ConversionFailed: the file is missing or damaged (`found` is None).
    """
    if found is None:
        raise ConversionFailed(f"{path}: missing or damaged; run the same command again to restore it")
    return found


def _remove(leftovers: Iterable[Path]) -> None:
    for leftover in leftovers:
        leftover.unlink(missing_ok=True)

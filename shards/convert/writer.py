"""Write one shard from its entries in the listing. Runs in worker processes."""

from __future__ import annotations

import errno
import os
import time
from collections import Counter
from dataclasses import dataclass

import numpy as np
import xxhash

from shards.convert.records import ShardDone
from shards.convert.work_folder import WorkFolder
from shards.errors import ConversionFailed, explain_os_errors, storage_error
from shards.files.durable import durable_file, durable_write
from shards.files.regular import NotRegular, open_with_status, read_up_to
from shards.format.index import INDEX_DTYPE
from shards.format.tar import SampleTar, dali_index
from shards.images.accept import accept
from shards.images.limits import MAX_ENCODED
from shards.images.ppm import ppm_header
from shards.images.rules import Accepted, ImageRules, Rejected
from shards.open_files import open_file_budget
from shards.redact import display_name, one_line
from shards.sources.listing import Container, Entry
from shards.workers.worker import Report


@dataclass(frozen=True)
class ShardJob:
    """One shard to be written in a worker process."""

    work: WorkFolder
    split: str
    shard: int
    rules: ImageRules


def write_shard(job: ShardJob, report: Report) -> None:
    """Write the files of one shard in this order: tar, DALI index, index rows, record of the finished shard.

    Raises:
        ConversionFailed: the source changed, the disk is full, or reading or writing failed. No incomplete file is
            published.
    """
    work = job.work
    work.remove_temporary(job.split, job.shard)
    listing, bounds = work.load_listing(job.split)
    start, stop = int(bounds[job.shard]), int(bounds[job.shard + 1])
    rows = np.zeros(stop - start, dtype=INDEX_DTYPE)
    repaired: Counter[str] = Counter()
    rejected: list[tuple[str, str]] = []
    samples = blank = 0
    path = work.tar(job.split, job.shard)
    with explain_os_errors(path):
        with durable_file(path) as file, ContainerReader() as reader:
            tar = SampleTar(file)
            for entry in listing.entries(start, stop):
                report.start(os.fsencode(entry.container.path) + entry.name[entry.name.rfind(b"/") :])
                try:
                    image = accept(reader.read(entry), job.rules)
                except Rejected as error:
                    rejected.append((display_name(entry.name), one_line(str(error))))
                else:
                    ppm = ppm_header(image.height, image.width) if job.rules.pixels else b""
                    offset = tar.add(entry.key, image.data, entry.label, ppm)
                    rows[samples] = index_row(image, entry.label, offset, job.shard)
                    repaired.update([image.repair] if image.repair else [])
                    blank += image.blank
                    samples += 1
                report(1, entry.size)
            digest = tar.finish()
        if work.keeps_tars:
            durable_write(path.with_suffix(".idx"), dali_index(tar.index_lines))
        done = ShardDone(
            samples=samples,
            bytes=tar.bytes,
            hash=digest,
            repaired=dict(sorted(repaired.items())),
            rejected=rejected,
            blank=blank,
            rewritten=reader.rewritten,
        )
        work.save_done(job.split, job.shard, done, rows[:samples])


class ContainerReader:
    """Reads the encoded images of entries. Keeps the most recently used archives open.

    Attributes:
        rewritten: number of files so far that were modified after they were listed, without a change of size.
    """

    MAX_OPEN = 64

    def __init__(self) -> None:
        self._limit = open_file_budget(self.MAX_OPEN)
        self._open: dict[Container, int] = {}
        self.rewritten = 0

    def read(self, entry: Entry, most: int = MAX_ENCODED) -> bytes:
        """Return the encoded image.

        Args:
            most: number of bytes to read, from the start of the image.

        Raises:
            Rejected: the file is a dangling symbolic link, or too large for an image.
            ConversionFailed: the file or archive has changed since it was listed.
            StorageFailed: the file or archive cannot be read.
        """
        if entry.size > MAX_ENCODED:
            raise Rejected(f"{entry.size:,} bytes, more than the {MAX_ENCODED:,} bytes that are allowed")
        size = min(entry.size, most)
        try:
            data = self._read_file(entry, size) if entry.offset is None else self._read_range(entry, size)
        except FileNotFoundError as error:
            raise _source_changed(entry, "existed when the source was listed, but no longer does") from error
        except NotRegular as error:
            raise _source_changed(entry, f"was a regular file when the source was listed, now {error.kind}") from error
        except OSError as error:
            raise storage_error(entry.path, error) from error
        if len(data) != size:
            raise _source_changed(entry, f"had {entry.size} bytes when the source was listed, now {len(data)}")
        return data

    def _read_file(self, entry: Entry, size: int) -> bytes:
        path = os.fsencode(entry.container.path) + entry.name[entry.name.rfind(b"/") :]
        try:
            handle, status = open_with_status(path)
        except FileNotFoundError as error:
            if os.path.islink(path):
                raise Rejected("a dangling symbolic link") from error
            raise
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise Rejected("a symbolic link to itself") from error
            raise
        try:
            if status.st_size != entry.size:
                raise _source_changed(entry, f"had {entry.size} bytes when the source was listed, now {status.st_size}")
            self.rewritten += int(status.st_mtime) != entry.mtime
            return read_up_to(handle, size) if size else b""  # files in /proc have content but size 0
        finally:
            os.close(handle)

    def _read_range(self, entry: Entry, size: int) -> bytes:
        assert entry.offset is not None
        handle = self._open.pop(entry.container, None)
        if handle is None:
            handle, status = open_with_status(entry.container.path)
            if not entry.container.is_still(status):
                os.close(handle)
                listed = entry.container
                raise _source_changed(
                    entry,
                    f"the archive had {listed.size} bytes and was last modified at {_format_time(listed.mtime)} when "
                    f"the source was listed, now {status.st_size} bytes and {_format_time(int(status.st_mtime))}",
                )
            if len(self._open) >= self._limit:
                os.close(self._open.pop(next(iter(self._open))))
        self._open[entry.container] = handle
        return os.pread(handle, size, entry.offset)

    def __enter__(self) -> ContainerReader:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._open.values():
            os.close(handle)


def _source_changed(entry: Entry, fact: str) -> ConversionFailed:
    return ConversionFailed(
        f"{entry.path}: {fact}; restore the source and run the same command, or remove the unfinished set and start "
        "again"
    )


def _format_time(mtime: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(mtime))


def index_row(image: Accepted, label: int, offset: int, shard: int) -> tuple[int, ...]:
    """Return the index row of an image, in the order of `INDEX_DTYPE`."""
    return (
        offset,
        xxhash.xxh3_64_intdigest(image.data),
        shard,
        len(image.data),
        label,
        image.height,
        image.width,
        image.orientation,
        int(image.repair is not None),
    )

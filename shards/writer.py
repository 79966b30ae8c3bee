"""One shard, from listed entries to a published tar. Runs in worker processes."""

from __future__ import annotations

import errno
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from shards.durable import durable_file, durable_write
from shards.errors import ConversionFailed, explained
from shards.images import MAX_ENCODED, Accepted, ImageRules, Rejected, accept
from shards.index import INDEX_DTYPE
from shards.listing import Entry, printable
from shards.pool import Report
from shards.tar import SampleTar, dali_index
from shards.work import ShardDone, Work


@dataclass(frozen=True)
class ShardJob:
    """One shard to be made in a worker process."""

    work: Work
    split: str
    shard: int
    rules: ImageRules


def write_shard(job: ShardJob, report: Report) -> None:
    """Make one shard: tar, DALI index, rows, and the record that it is done, in this order.

    Raises:
        ConversionFailed: the source changed, the disk is full, or reading or writing failed; nothing is half-published.
    """
    work = job.work
    work.remove_temporary(job.split, job.shard)
    listing, bounds = work.load_listing(job.split)
    start, stop = int(bounds[job.shard]), int(bounds[job.shard + 1])
    rows = np.zeros(stop - start, dtype=INDEX_DTYPE)
    repaired: Counter[str] = Counter()
    rejected: list[tuple[str, str]] = []
    samples = 0
    path = work.tar(job.split, job.shard)
    with explained(path):
        with durable_file(path) as file, ContainerReader() as reader:
            tar = SampleTar(file)
            for entry in listing.entries(start, stop):
                try:
                    image = accept(reader.read(entry), job.rules)
                except Rejected as error:
                    rejected.append((printable(entry.name), str(error)))
                else:
                    offset = tar.add(entry.key, image.data, entry.label)
                    rows[samples] = index_row(image, entry.label, offset, job.shard)
                    repaired.update([image.repair] if image.repair else [])
                    samples += 1
                report(1, entry.size)
            digest = tar.finish()
        if work.keeps_tars:
            durable_write(path.with_suffix(".idx"), dali_index(tar.index_lines))
        done = ShardDone(
            samples=samples, bytes=tar.bytes, hash=digest, repaired=dict(sorted(repaired.items())), rejected=rejected
        )
        work.save_done(job.split, job.shard, done, rows[:samples])


class ContainerReader:
    """Reads entries, keeping the last archives open."""

    MAX_OPEN = 64

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}

    def read(self, entry: Entry) -> bytes:
        """The entry's encoded bytes.

        Raises:
            Rejected: the file may not be read, or is too large to be an image.
            ConversionFailed: it is not what was listed.
        """
        if entry.size > MAX_ENCODED:
            raise Rejected(f"unreasonably large: {entry.size} bytes")
        data = self._read_file(entry) if entry.offset is None else self._read_range(entry)
        if len(data) != entry.size:
            raise ConversionFailed(
                f"{entry.path}: {entry.size} bytes when it was listed, {len(data)} now: the source changed meanwhile; "
                "put it back and run the same command, or remove the unfinished set and start anew"
            )
        return data

    def _read_file(self, entry: Entry) -> bytes:
        path = os.fsencode(entry.container) + entry.name[entry.name.rfind(b"/") :]
        try:
            handle = os.open(path, os.O_RDONLY)
            try:
                return _read_up_to(handle, entry.size + 1)
            finally:
                os.close(handle)
        except PermissionError as error:
            raise Rejected(f"cannot be read: {error.strerror}") from error
        except FileNotFoundError as error:
            if os.path.islink(path):
                raise Rejected("a link to nothing") from error
            raise ConversionFailed(
                f"{entry.path}: listed, but gone now: the source changed meanwhile; "
                "put it back and run the same command, or remove the unfinished set and start anew"
            ) from error
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise Rejected("a link to itself") from error
            raise

    def _read_range(self, entry: Entry) -> bytes:
        assert entry.offset is not None
        handle = self._open.pop(entry.container, None)
        if handle is None:
            handle = os.open(entry.container, os.O_RDONLY)
            if len(self._open) == self.MAX_OPEN:
                os.close(self._open.pop(next(iter(self._open))))
        self._open[entry.container] = handle
        return os.pread(handle, entry.size, entry.offset)

    def __enter__(self) -> ContainerReader:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._open.values():
            os.close(handle)


def _read_up_to(handle: int, size: int) -> bytes:
    data = os.read(handle, size)
    if len(data) in (0, size) or len(data) == size - 1:
        return data
    parts = [data]
    while data := os.read(handle, size - sum(map(len, parts))):
        parts.append(data)
    return b"".join(parts)


def index_row(image: Accepted, label: int, offset: int, shard: int) -> tuple[int, ...]:
    """The image's row, in the order of `INDEX_DTYPE`."""
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

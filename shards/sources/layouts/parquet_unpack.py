"""UnpackJob the images of one Parquet file into a spool file, in a worker process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from shards.errors import UserError, first_line, storage_error
from shards.files.durable import durable_file, durable_write, write_all
from shards.files.regular import open_regular, read_bounded
from shards.images.limits import MAX_ENCODED
from shards.redact import display_name
from shards.schema import Count, parse_json
from shards.sources.layouts.parquet_columns import class_names, find_columns, other_columns
from shards.sources.naming.labels import FileLabels, LabelReader, NoLabelError
from shards.workers.worker import Report

BATCH_ROWS = 64
MAX_FOOTER = 2**26
"""Bytes of a file's metadata."""
MAX_CHUNK = 2**31
"""Bytes of one column of one row group, packed and unpacked: a worker holds it in memory."""
MAX_RATIO = 100
"""Bytes that a file may unpack to, for each of its own; encoded images hardly shrink."""
_SMALL = 2**26  # bytes that any file may unpack to
_MAX_RECORD = 2**31  # bytes of the list of an unpacked file
_AGAIN = "download it again"


@dataclass(frozen=True)
class UnpackJob:
    """One file to be unpacked in a worker process."""

    file: Path
    spool: Path
    unlabeled: bool = False
    """Count rows without a label instead of refusing them: the file is of a test split."""

    @property
    def record(self) -> Path:
        return self.spool.with_suffix(".json")


@dataclass(frozen=True)
class ParquetInfo:
    """What a file says of itself."""

    rows: int
    columns: tuple[str, str]
    """Names of the columns of images and of labels."""
    names: list[str | None]
    """Of the classes, by label; empty where it gives none."""
    notes: tuple[str, ...]
    """Lines that the person should see."""


@dataclass(frozen=True)
class Unpacked:
    """What was unpacked from a file, which is recorded when it is done."""

    source: tuple[str, int, int]
    """Path, bytes and time of last change of the file. A file that comes or goes shifts the spools of the others."""
    bytes: Count
    """Of the spool."""
    images: list[tuple[str, Count, Count, Count]]
    """Name, offset, size and label of each, the last as `LabelReader.read` gives it."""
    labels: FileLabels
    unlabeled: Count
    """Rows that have no label."""


_UNPACKED = TypeAdapter(Unpacked)


def unpack(job: UnpackJob, report: Report) -> FileLabels:
    """Write a file's images one after the other, and a list of (name, offset, size, label); skip what is done.

    Returns:
        Its labels.

    Raises:
        UserError: a row without image bytes or a valid label, a damaged page, or more than `MAX_RATIO` times the file.
    """
    before = load_unpacked(job)
    if before is not None:
        return before.labels
    found = []
    labels = LabelReader()
    at = unlabeled = 0
    report.start(os.fsencode(job.file))
    with _opened(job.file) as (table, source), durable_file(job.spool) as file:
        most = max(_SMALL, MAX_RATIO * source[1])
        for number, (image, label) in enumerate(_rows(table, job.file)):
            data, name = _unwrap(job.file, image, number)
            shown = f"{job.file}: row {number}"
            report.start(shown.encode("utf-8", "surrogateescape"))
            try:
                place = labels.read(label, shown)
            except NoLabelError:
                if not job.unlabeled:
                    raise
                unlabeled += 1
                continue
            if at + len(data) > most:
                raise UserError(
                    f"{shown}: unpacks to more than {most:,} bytes, {MAX_RATIO} times the file: damaged, or made to "
                    "fill disks"
                )
            found.append((name, at, len(data), place))
            if len(data) <= MAX_ENCODED:  # larger ones are rejected by their size, unread
                write_all(file, data)
                at += len(data)
            report(1, len(data))
    record = Unpacked(source, at, found, labels.found(), unlabeled)
    durable_write(job.record, _UNPACKED.dump_json(record))
    return record.labels


def load_unpacked(job: UnpackJob) -> Unpacked | None:
    """What was unpacked; None where that is not done, or not of this file as it is now."""
    try:
        record = parse_json(read_bounded(job.record, _MAX_RECORD), _UNPACKED, limit=_MAX_RECORD)
        spooled = job.spool.stat().st_size
    except (FileNotFoundError, ValueError):
        return None
    return record if record.source == _identity(job.file, job.file.stat()) and record.bytes == spooled else None


def _identity(file: Path, status: os.stat_result) -> tuple[str, int, int]:
    return display_name(bytes(file.absolute())), status.st_size, status.st_mtime_ns


@contextmanager
def _opened(file: Path) -> Iterator[tuple[Any, tuple[str, int, int]]]:
    """Open a Parquet file whose metadata has been looked at, and say which file it is.

    Raises:
        UserError: it is damaged, or no such file.
        StorageFailed: it cannot be read.
    """
    import pyarrow.parquet as pq

    with ExitStack() as stack:
        with _readable_errors(file):
            source = stack.enter_context(os.fdopen(open_regular(file), "rb"))
            identity = _identity(file, os.fstat(source.fileno()))
            source.seek(max(0, identity[1] - 8))
            end = source.read(8)
            if len(end) < 8 or end[4:] != b"PAR1":
                raise UserError(f"{file}: not a Parquet file, or truncated: it does not end with PAR1; {_AGAIN}")
            footer = int.from_bytes(end[:4], "little")
            if footer > MAX_FOOTER:
                raise UserError(
                    f"{file}: {footer:,} bytes of metadata, more than the {MAX_FOOTER:,} that a file may have"
                )
            table = stack.enter_context(pq.ParquetFile(source, pre_buffer=False, page_checksum_verification=True))
        yield table, identity


@contextmanager
def _readable_errors(file: Path) -> Iterator[None]:
    """Convert what pyarrow raises in the block, which reads `file`, into an error of one line.

    Raises:
        UserError: it is damaged.
        StorageFailed: it cannot be read.
    """
    import pyarrow as pa

    try:
        yield
    # pyarrow has its own errors, plain OSErrors without a number, and those of converting text and numbers.
    except (pa.ArrowException, OSError, ValueError, LookupError, ArithmeticError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise storage_error(file, error) from error
        raise UserError(f"{file}: damaged ({first_line(error)}); {_AGAIN}") from error


def inspect(file: Path, report: Report) -> ParquetInfo:
    """Check the types and sizes that a file states, before any row is read."""
    report.start(os.fsencode(file))
    with _opened(file) as (table, _), _readable_errors(file):
        columns = find_columns(table.schema_arrow, file)
        metadata = table.metadata
        for group in range(metadata.num_row_groups):
            row_group = metadata.row_group(group)
            for i in range(row_group.num_columns):
                column = row_group.column(i)
                size = max(column.total_compressed_size, column.total_uncompressed_size)
                if column.path_in_schema.partition(".")[0] in columns and not 0 <= size <= MAX_CHUNK:
                    raise UserError(
                        f"{file}: row group {group} has {size:,} bytes in column {column.path_in_schema}, more than "
                        f"the {MAX_CHUNK:,} that are held in memory at once; write the file with smaller row groups"
                    )
        names, notes = class_names(file, table.schema_arrow.metadata, columns[1])
        others = other_columns(table.schema_arrow.names, columns)
        return ParquetInfo(max(0, int(metadata.num_rows)), columns, names, notes + others)


def _rows(table: Any, file: Path) -> Iterator[tuple[Any, Any]]:
    with _readable_errors(file):
        image, label = find_columns(table.schema_arrow, file)
        for batch in table.iter_batches(BATCH_ROWS, columns=[image, label], use_threads=False):
            yield from zip(batch.column(image).to_pylist(), batch.column(label).to_pylist(), strict=True)


def _unwrap(file: Path, image: Any, number: int) -> tuple[bytes, str]:
    """Encoded bytes and name of an image: plain bytes, or the hubs' struct of bytes and path."""
    data, path = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, None)
    if not isinstance(data, bytes):
        raise UserError(f"{file}: row {number} holds no image bytes; export the data set with its images embedded")
    return data, Path(path).name if path else f"{display_name(os.fsencode(file.stem))}-{number:06d}"

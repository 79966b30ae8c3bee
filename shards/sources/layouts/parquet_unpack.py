"""Unpack the images of one Parquet file into a spool file, in a worker process."""

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
"""Maximum bytes of a file's metadata."""
MAX_CHUNK = 2**31
"""Maximum bytes of one column of one row group, compressed and uncompressed: a worker holds it in memory."""
MAX_RATIO = 100
"""Maximum ratio of unpacked size to file size; encoded images hardly compress."""
_SMALL = 2**26  # unpacked size in bytes up to which any ratio is allowed
_MAX_RECORD = 2**31  # maximum bytes of the record of an unpacked file
_AGAIN = "download it again"


@dataclass(frozen=True)
class UnpackJob:
    """Job to unpack one file in a worker process."""

    file: Path
    spool: Path
    unlabeled: bool = False
    """Count rows without a label instead of raising an error, because the file belongs to a test split."""

    @property
    def record(self) -> Path:
        return self.spool.with_suffix(".json")


@dataclass(frozen=True)
class ParquetInfo:
    """Contents of a Parquet file according to its metadata."""

    rows: int
    columns: tuple[str, str]
    """Names of the image column and of the label column."""
    names: list[str | None]
    """Class names by label; empty if the file has none."""
    notes: tuple[str, ...]
    """Messages for the user."""


@dataclass(frozen=True)
class Unpacked:
    """Record of an unpacked file, written when unpacking is complete."""

    source: tuple[str, int, int]
    """(path, bytes, modification time) of the file; needed because adding or removing files renumbers spool files."""
    bytes: Count
    """Size of the spool file."""
    images: list[tuple[str, Count, Count, Count]]
    """(name, offset, size, label) of each image; the label is a result of `LabelReader.read`."""
    labels: FileLabels
    unlabeled: Count
    """Number of rows without a label."""


_UNPACKED = TypeAdapter(Unpacked)


def unpack(job: UnpackJob, report: Report) -> FileLabels:
    """Write the images of a file to its spool file, and the record; do nothing if both are complete.

    Returns:
        The labels of the file.

    Raises:
        UserError: a row has no image bytes or no valid label, a page is damaged, or the file unpacks to more than
            `MAX_RATIO` times its size.
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
                    f"{shown}: the file unpacks to more than {most:,} bytes, {MAX_RATIO} times its size, so it is "
                    "damaged or malicious"
                )
            found.append((name, at, len(data), place))
            if len(data) <= MAX_ENCODED:  # larger images are not stored, because they will be rejected
                write_all(file, data)
                at += len(data)
            report(1, len(data))
    record = Unpacked(source, at, found, labels.found(), unlabeled)
    durable_write(job.record, _UNPACKED.dump_json(record))
    return record.labels


def load_unpacked(job: UnpackJob) -> Unpacked | None:
    """Read the record of an unpacked file; None if unpacking is incomplete or the file has changed since."""
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
    """Open a Parquet file after checking its footer; yields the file and its identity.

    Raises:
        UserError: the file is damaged or does not exist.
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
                    f"{file}: has {footer:,} bytes of metadata; at most {MAX_FOOTER:,} are allowed"
                )
            table = stack.enter_context(pq.ParquetFile(source, pre_buffer=False, page_checksum_verification=True))
        yield table, identity


@contextmanager
def _readable_errors(file: Path) -> Iterator[None]:
    """Convert errors of pyarrow while reading `file` to errors with a one-line message.

    Raises:
        UserError: the file is damaged.
        StorageFailed: it cannot be read.
    """
    import pyarrow as pa

    try:
        yield
    # pyarrow raises its own errors, OSErrors without errno, and errors from converting text and numbers.
    except (pa.ArrowException, OSError, ValueError, LookupError, ArithmeticError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise storage_error(file, error) from error
        raise UserError(f"{file}: damaged ({first_line(error)}); {_AGAIN}") from error


def inspect(file: Path, report: Report) -> ParquetInfo:
    """Check the column types and sizes in the metadata of a file, before reading rows."""
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
                        f"{file}: row group {group} has {size:,} bytes in column {column.path_in_schema}; at most "
                        f"{MAX_CHUNK:,} are allowed; write the file again with smaller row groups"
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
    """Return the encoded bytes and the name of an image, which is bytes or a struct of bytes and path."""
    data, path = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, None)
    if not isinstance(data, bytes):
        raise UserError(f"{file}: row {number} has no image bytes; export the data set with embedded images")
    return data, Path(path).name if path else f"{display_name(os.fsencode(file.stem))}-{number:06d}"

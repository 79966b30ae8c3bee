"""Parquet files as dataset hubs give them: a column of encoded images and a column of labels.

Images in a Parquet page have no place of their own in the file, and reading one means decompressing its page: shuffling
them in place would read everything thousands of times. So each file is unpacked once, in order, into a spool file
beside the shards to be (as large again as the source, removed at the end), and entries are byte ranges of that.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from shards.errors import UserError, first_line, storage_error
from shards.files.durable import durable_file, durable_write, write_all
from shards.files.regular import open_regular, read_bounded
from shards.format.manifest import ClassEntry
from shards.images.limits import MAX_ENCODED
from shards.progress import Progress
from shards.redact import display_name, one_line
from shards.schema import Count, parse_json
from shards.sources.layouts.parquet_columns import class_names, find_columns, other_columns
from shards.sources.listing import Container, ListingBuilder
from shards.sources.naming.beside import look_beside
from shards.sources.naming.labels import FileLabels, LabelReader, NoLabelError, largest_label, number_classes
from shards.sources.naming.splits import below_source, split_files
from shards.sources.scan import TEST, Scan
from shards.sources.unused import UnusedFiles
from shards.sources.walk import files_below
from shards.workers.pool import Report, run_jobs

BATCH_ROWS = 64
ISOLATED = True
"""Whether pyarrow, which ends its process on some damaged files, reads in others than this, unless `workers` is 1."""
MAX_FOOTER = 2**26
"""Bytes of a file's metadata."""
MAX_CHUNK = 2**31
"""Bytes of one column of one row group, packed and unpacked: a worker holds it in memory."""
MAX_RATIO = 100
"""Bytes that a file may unpack to, for each of its own; encoded images hardly shrink."""
_SMALL = 2**26  # bytes that any file may unpack to
_MAX_RECORD = 2**31  # bytes of the list of an unpacked file
_NEEDS = "reading Parquet needs pyarrow; install it with: pip install 'fat-pipeline[parquet]'"
_AGAIN = "download it again"


@dataclass(frozen=True)
class Unpack:
    """One file to be unpacked in a worker process."""

    file: Path
    spool: Path
    unlabeled: bool = False
    """Count rows without a label instead of refusing them: the file is of a test split."""

    @property
    def record(self) -> Path:
        return self.spool.with_suffix(".json")


@dataclass(frozen=True)
class Contents:
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


def parquet_files(source: Path) -> list[Path]:
    """The Parquet files below a folder, by name; the file itself where `source` is one."""
    return files_below(source, ".parquet")


def scan_parquet(source: Path, spool: Path, workers: int | None, classes: Path | None = None) -> Scan:
    """Unpack all files into `spool` and list them.

    Args:
        classes: file that names the classes, as `number_classes` takes it.

    Raises:
        UserError: pyarrow is not installed; the columns are not there, of other types, or not the same in all files; a
            file is damaged; or labels that `number_classes` refuses.
        StorageFailed: a file cannot be read.
    """
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise UserError(f"{source}: {_NEEDS}") from None
    files = parquet_files(source)
    if not files:
        raise UserError(f"{source}: no Parquet files in it")
    named = split_files(files, source)
    spool.mkdir(parents=True, exist_ok=True)
    jobs = [Unpack(file, spool / f"{i:05d}.bin", named.splits[file] == TEST) for i, file in enumerate(files)]
    isolated = ISOLATED and workers != 1
    contents = run_jobs(inspect, files, workers, Progress("inspecting", len(files), "files"), isolated=isolated)
    names, more_notes = _agreed(files, contents)
    with Progress("unpacking", sum(one.rows for one in contents)) as progress:
        labels = run_jobs(unpack, jobs, workers, progress, isolated=isolated)
    if not any(file.first for file in labels):
        raise UserError(f"{source}: no images with labels in its Parquet files")
    top, where = largest_label(labels)
    if 0 < len(names) <= top:
        raise UserError(
            f"{where}: label {top}, but the file's metadata names {len(names):,} classes (0 to {len(names) - 1}); "
            "correct the labels, or write the files again without the metadata 'huggingface'"
        )
    known = _named_classes(names if top >= 0 else [])
    numbered = number_classes(labels, sum(one.rows for one in contents), known=known, classes=classes)
    builders: dict[str, ListingBuilder] = {}
    unused, doubts = UnusedFiles(), list(named.doubts)
    doubts += look_beside(source, set(files), "parquet", set(named.splits.values()), unused)
    for job, own in zip(jobs, numbered.labels, strict=True):
        found = _load_record(job)
        if found is None:
            raise UserError(f"{job.file}: changed while it was unpacked; run the same command again")
        if found.unlabeled:
            unused.add("image without a label", below_source(job.file, source), kind="rows", count=found.unlabeled)
            doubts.append(f"{job.file}: {found.unlabeled:,} test images without labels, not used")
        if not found.images and found.unlabeled:
            continue
        texts = found.labels.texts
        builders.setdefault(named.splits[job.file], ListingBuilder()).add_ranges(
            Container.of(job.spool),
            [
                (
                    f"{texts[label] if texts else label}/{name}".encode("utf-8", "surrogateescape"),
                    offset,
                    size,
                    int(own[label]),
                )
                for name, offset, size, label in found.images
            ],
        )
    listed = {split: builder.build() for split, builder in builders.items()}
    notes = (*named.notes_on(builders), *more_notes)
    return Scan("parquet", numbered.classes, listed, unused.entries(), notes, tuple(doubts))


def _named_classes(names: list[str | None]) -> list[ClassEntry]:
    """Classes that are told apart by their names, as class folders are; by their numbers where names do not do so."""
    folders = [one_line(name) if name else "" for name in names]
    if all(folders) and len(set(folders)) == len(folders):
        shown = [folder.split(",")[0] for folder in folders]
        return [
            ClassEntry(folder=folder, name=name if name != folder else None)
            for folder, name in zip(folders, shown, strict=True)
        ]
    return [ClassEntry(folder=str(label), name=folder.split(",")[0] or None) for label, folder in enumerate(folders)]


def _agreed(files: list[Path], contents: list[Contents]) -> tuple[list[str | None], tuple[str, ...]]:
    """Names that the files give the class numbers, empty where none does; and notes on them.

    Raises:
        UserError: two files differ in their columns or in the names of the classes.
    """
    named: Path | None = None
    names: list[str | None] = []
    for file, one in zip(files, contents, strict=True):
        if one.columns != contents[0].columns:
            raise UserError(
                f"{file}: images and labels in columns {' and '.join(one.columns)}, but in {files[0].name} in "
                f"{' and '.join(contents[0].columns)}; expected the same columns in all files of a source"
            )
        if one.names and named and one.names != names:
            place = next(i for i, (a, b) in enumerate(zip_longest(one.names, names)) if a != b)
            raise UserError(
                f"{file}: its metadata does not name the classes as that of {named.name} does (class {place} differs); "
                "expected files of one data set"
            )
        if one.names and not named:
            named, names = file, one.names
    return names, contents[0].notes


def unpack(job: Unpack, report: Report) -> FileLabels:
    """Write a file's images one after the other, and a list of (name, offset, size, label); skip what is done.

    Returns:
        Its labels.

    Raises:
        UserError: a row without image bytes or a valid label, a damaged page, or more than `MAX_RATIO` times the file.
    """
    before = _load_record(job)
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


def _load_record(job: Unpack) -> Unpacked | None:
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
        with _judged(file):
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
def _judged(file: Path) -> Iterator[None]:
    """Turn whatever pyarrow raises in the block, which reads `file`, into one line.

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


def inspect(file: Path, report: Report) -> Contents:
    """Check the types and sizes that a file states, before any row is read."""
    report.start(os.fsencode(file))
    with _opened(file) as (table, _), _judged(file):
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
        return Contents(max(0, int(metadata.num_rows)), columns, names, notes + others)


def _rows(table: Any, file: Path) -> Iterator[tuple[Any, Any]]:
    with _judged(file):
        image, label = find_columns(table.schema_arrow, file)
        for batch in table.iter_batches(BATCH_ROWS, columns=[image, label], use_threads=False):
            yield from zip(batch.column(image).to_pylist(), batch.column(label).to_pylist(), strict=True)


def _unwrap(file: Path, image: Any, number: int) -> tuple[bytes, str]:
    """Encoded bytes and name of an image: plain bytes, or the hubs' struct of bytes and path."""
    data, path = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, None)
    if not isinstance(data, bytes):
        raise UserError(f"{file}: row {number} holds no image bytes; export the data set with its images embedded")
    return data, Path(path).name if path else f"{display_name(os.fsencode(file.stem))}-{number:06d}"

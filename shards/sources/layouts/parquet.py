"""Parquet files as dataset hubs give them: a column of encoded images and a column of labels.

Images in a Parquet page have no place of their own in the file, and reading one means decompressing its page: shuffling
them in place would read everything thousands of times. So each file is unpacked once, in order, into a spool file
beside the shards to be (as large again as the source, removed at the end), and entries are byte ranges of that.
"""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path

from shards.errors import UserError
from shards.format.manifest_fields import ClassEntry
from shards.progress import Progress
from shards.redact import one_line
from shards.sources.layouts.parquet_unpack import ParquetInfo, UnpackJob, inspect, load_unpacked, unpack
from shards.sources.listing import Container, ListingBuilder
from shards.sources.naming.labels import largest_label, number_classes
from shards.sources.naming.non_archive_files import count_non_archive_files
from shards.sources.naming.splits import assign_splits, relative_to_source
from shards.sources.scan import TEST, Scan
from shards.sources.unused import UnusedFiles
from shards.sources.walk import files_below
from shards.workers.pool import run_jobs

ISOLATED = True
"""Whether pyarrow, which ends its process on some damaged files, reads in others than this, unless `workers` is 1."""
_NEEDS = "reading Parquet needs pyarrow; install it with: pip install 'fat-pipeline[parquet]'"


def parquet_files(source: Path) -> list[Path]:
    """The Parquet files below a folder, by name; the file itself where `source` is one."""
    return files_below(source, ".parquet")


def scan_parquet(source: Path, spool: Path, workers: int | None, classes: Path | None = None) -> Scan:
    """UnpackJob all files into `spool` and list them.

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
    named = assign_splits(files, source)
    spool.mkdir(parents=True, exist_ok=True)
    jobs = [UnpackJob(file, spool / f"{i:05d}.bin", named.splits[file] == TEST) for i, file in enumerate(files)]
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
    unused, warnings = UnusedFiles(), list(named.warnings)
    warnings += count_non_archive_files(source, set(files), "parquet", set(named.splits.values()), unused)
    for job, own in zip(jobs, numbered.labels, strict=True):
        found = load_unpacked(job)
        if found is None:
            raise UserError(f"{job.file}: changed while it was unpacked; run the same command again")
        if found.unlabeled:
            unused.add("image without a label", relative_to_source(job.file, source), kind="rows", count=found.unlabeled)
            warnings.append(f"{job.file}: {found.unlabeled:,} test images without labels, not used")
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
    notes = (*named.all_notes(builders), *more_notes)
    return Scan("parquet", numbered.classes, listed, unused.entries(), notes, tuple(warnings))


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


def _agreed(files: list[Path], contents: list[ParquetInfo]) -> tuple[list[str | None], tuple[str, ...]]:
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

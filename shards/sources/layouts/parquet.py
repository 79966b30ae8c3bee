"""Layout parquet: files from data set hubs, with a column of encoded images and a column of labels.

Reading one image of a Parquet file requires decompressing its page, so reading in shuffled order would decompress each
page thousands of times. Each file is therefore unpacked once, in order, into a spool file in the output folder, and the
images are byte ranges of the spool files. They need as much disk space as the source, and are removed at the end.
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
"""Whether pyarrow runs in worker processes unless `workers` is 1, because it crashes on some damaged files."""
_NEEDS = "reading Parquet needs pyarrow; install it with: pip install 'fat-pipeline[parquet]'"


def parquet_files(source: Path) -> list[Path]:
    """Return the sorted Parquet files below a folder, or `source` if it is a file."""
    return files_below(source, ".parquet")


def scan_parquet(source: Path, spool: Path, workers: int | None, classes: Path | None = None) -> Scan:
    """Unpack the images of all files into `spool` and list them.

    Args:
        spool: folder for the spool files.
        classes: file that names the classes; see `number_classes`.

    Raises:
        UserError: pyarrow is not installed; columns are missing, have other types, or differ between files; a file is
            damaged; or `number_classes` rejects the labels.
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
    with Progress("inspecting", len(files), "files") as progress:
        contents = run_jobs(inspect, files, workers, progress, isolated=isolated)
    names, more_notes = _common_class_names(files, contents)
    with Progress("unpacking", sum(one.rows for one in contents)) as progress:
        labels = run_jobs(unpack, jobs, workers, progress, isolated=isolated)
    if not any(file.first for file in labels):
        raise UserError(f"{source}: its Parquet files contain no images with labels")
    top, where = largest_label(labels)
    if 0 < len(names) <= top:
        raise UserError(
            f"{where}: label {top}, but the file's metadata names {len(names):,} classes (0 to {len(names) - 1}); "
            "correct the labels, or write the files again without the metadata key 'huggingface'"
        )
    known = _named_classes(names if top >= 0 else [])
    numbered = number_classes(labels, sum(one.rows for one in contents), known=known, classes=classes)
    builders: dict[str, ListingBuilder] = {}
    unused, warnings = UnusedFiles(), list(named.warnings)
    warnings += count_non_archive_files(source, set(files), "parquet", set(named.splits.values()), unused)
    for job, labels_of_file in zip(jobs, numbered.labels, strict=True):
        found = load_unpacked(job)
        if found is None:
            raise UserError(f"{job.file}: changed while it was being unpacked; repeat the command")
        if found.unlabeled:
            path = relative_to_source(job.file, source)
            unused.add("image without a label", path, kind="rows", count=found.unlabeled)
            warnings.append(f"{job.file}: {found.unlabeled:,} test images have no labels and are not used")
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
                    int(labels_of_file[label]),
                )
                for name, offset, size, label in found.images
            ],
        )
    listed = {split: builder.build() for split, builder in builders.items()}
    notes = (*named.all_notes(builders), *more_notes)
    return Scan("parquet", numbered.classes, listed, unused.entries(), notes, tuple(warnings))


def _named_classes(names: list[str | None]) -> list[ClassEntry]:
    """Return the classes, identified by their names; by their numbers if names are missing or not unique."""
    folders = [one_line(name) if name else "" for name in names]
    if all(folders) and len(set(folders)) == len(folders):
        shown = [folder.split(",")[0] for folder in folders]
        return [
            ClassEntry(folder=folder, name=name if name != folder else None)
            for folder, name in zip(folders, shown, strict=True)
        ]
    return [ClassEntry(folder=str(label), name=folder.split(",")[0] or None) for label, folder in enumerate(folders)]


def _common_class_names(files: list[Path], contents: list[ParquetInfo]) -> tuple[list[str | None], tuple[str, ...]]:
    """Return the class names that the files state (an empty list if none does), and notes on them.

    Raises:
        UserError: two files differ in their columns or class names.
    """
    named: Path | None = None
    names: list[str | None] = []
    for file, one in zip(files, contents, strict=True):
        if one.columns != contents[0].columns:
            raise UserError(
                f"{file}: images and labels are in columns {' and '.join(one.columns)}, but in {files[0].name} they "
                f"are in {' and '.join(contents[0].columns)}; all files of a source must have the same columns"
            )
        if one.names and named and one.names != names:
            differs = next(i for i, (a, b) in enumerate(zip_longest(one.names, names)) if a != b)
            raise UserError(
                f"{file}: its class names differ from those in {named.name} (first at class {differs}); all files must "
                "be of the same data set"
            )
        if one.names and not named:
            named, names = file, one.names
    return names, contents[0].notes

"""Parquet files as dataset hubs give them: a column of encoded images and a column of labels.

Images in a Parquet page have no place of their own in the file, and reading one means decompressing its page: shuffling
them in place would read everything thousands of times. So each file is unpacked once, in order, into a spool file
beside the shards to be (as large again as the source, removed at the end), and entries are byte ranges of that.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.durable import durable_file, durable_write, write_all
from shards.errors import UserError
from shards.listing import ListingBuilder
from shards.manifest import ClassEntry
from shards.pool import Report, run_jobs
from shards.progress import Progress
from shards.sources.scan import TRAIN, VAL, Scan

IMAGE_COLUMNS = ("image", "img", "jpg", "png")
LABEL_COLUMNS = ("label", "labels", "cls", "fine_label")
BATCH_ROWS = 64
_NEEDS = "reading Parquet needs pyarrow; install it with: pip install 'fat-pipeline[parquet]'"


@dataclass(frozen=True)
class Unpack:
    """One file to be unpacked in a worker process."""

    file: Path
    spool: Path


def parquet_files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    return sorted(path for folder in (source, source / "data") for path in folder.glob("*.parquet"))


def scan_parquet(source: Path, spool: Path, workers: int | None) -> Scan:
    """Unpack all files into `spool` and list them.

    Raises:
        UserError: pyarrow is not installed, or the columns are not there.
    """
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(f"{source}: {_NEEDS}") from None
    splits, notes = _splits(parquet_files(source))
    if not splits:
        raise UserError(f"{source}: no Parquet files in it")
    files = list(splits)
    spool.mkdir(parents=True, exist_ok=True)
    jobs = [Unpack(file, spool / f"{i:05d}.bin") for i, file in enumerate(files)]
    with Progress("unpacking", sum(pq.read_metadata(file).num_rows for file in files)) as progress:
        run_jobs(unpack, jobs, workers, progress)
    names: list[str | None] = _class_names(pq.read_schema(files[0]).metadata or {}, _columns(files[0])[1])
    builders: dict[str, ListingBuilder] = {}
    top = 0
    for job in jobs:
        found = json.loads(job.spool.with_suffix(".json").read_bytes())
        labels = [row[3] for row in found]
        top = max(top, *labels)
        builders.setdefault(splits[job.file], ListingBuilder()).add(
            job.spool,
            [
                (f"{label}/{name}".encode("utf-8", "surrogateescape"), offset, size, label)
                for name, offset, size, label in found
            ],
        )
    names += [None] * (top + 1 - len(names))
    classes = tuple(
        ClassEntry(folder=str(label), name=name.split(",")[0] if name else None) for label, name in enumerate(names)
    )
    return Scan("parquet", classes, {split: builder.build() for split, builder in builders.items()}, notes=notes)


def _splits(files: list[Path]) -> tuple[dict[Path, str], tuple[str, ...]]:
    """File -> split, by the word that its name begins with. A test split is validation where there is no other."""
    kinds = {file: file.name.lower()[:3] for file in files}
    if "val" not in kinds.values():
        return {file: VAL if kind == "tes" else TRAIN for file, kind in kinds.items()}, ()
    left_out = [file.name for file, kind in kinds.items() if kind == "tes"]
    notes = (f"{left_out[0]}: a test split, left out ({len(left_out)} such files)",) if left_out else ()
    return {file: VAL if kind == "val" else TRAIN for file, kind in kinds.items() if kind != "tes"}, notes


def unpack(job: Unpack, report: Report) -> None:
    """Write a file's images one after the other, and a list of (name, offset, size, label); skip what is done."""
    import pyarrow.parquet as pq

    listed = job.spool.with_suffix(".json")
    if listed.exists():
        return
    found = []
    at = 0
    image_column, label_column = _columns(job.file)
    with durable_file(job.spool) as file, pq.ParquetFile(job.file) as table:
        for number, (image, label) in enumerate(_rows(table, image_column, label_column)):
            data, name = _unwrap(job.file, image, number)
            if label is None or label < 0:
                raise UserError(f"{job.file}: row {number} has label {label}: a split without labels; leave it out")
            write_all(file, data)
            found.append((name, at, len(data), label))
            at += len(data)
            report(1, len(data))
    durable_write(listed, json.dumps(found).encode())


def _columns(file: Path) -> tuple[str, str]:
    import pyarrow.parquet as pq

    names = pq.read_schema(file).names
    image = next((name for name in IMAGE_COLUMNS if name in names), None)
    label = next((name for name in LABEL_COLUMNS if name in names), None)
    if image is None or label is None:
        raise UserError(
            f"{file}: columns {', '.join(names)}; expected an image ({' or '.join(IMAGE_COLUMNS)}) "
            f"and a label ({' or '.join(LABEL_COLUMNS)})"
        )
    return image, label


def _rows(table: Any, image: str, label: str) -> Iterator[tuple[Any, int]]:
    for batch in table.iter_batches(BATCH_ROWS, columns=[image, label]):
        yield from zip(batch.column(image).to_pylist(), batch.column(label).to_pylist(), strict=True)


def _unwrap(file: Path, image: Any, number: int) -> tuple[bytes, str]:
    """Encoded bytes and name of an image: plain bytes, or the hubs' struct of bytes and path."""
    data, path = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, None)
    if not isinstance(data, bytes):
        raise UserError(f"{file}: row {number} holds no image bytes; export the data set with its images embedded")
    return data, Path(path).name if path else f"{file.stem}-{number:06d}"


def _class_names(metadata: dict[bytes, bytes], column: str) -> list[str | None]:
    """Names that the hub's own metadata gives the labels; empty where there are none."""
    try:
        return json.loads(metadata[b"huggingface"])["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError):
        return []

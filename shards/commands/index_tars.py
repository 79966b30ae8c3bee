"""`pipeline index`: turn existing WebDataset tars into a shard set in place, without copying them.

Only an index and a manifest are written next to the tars. The samples keep their order. The manifest records that this
project did not shuffle them, and the mean number of consecutive samples with the same label.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from shards.commands.index_tar import MIXED, IndexedTar, IndexJob, index_tar
from shards.convert.join import print_notes, publish_manifest, summarize_warnings, to_unused_records
from shards.convert.options import MAX_REJECTS
from shards.convert.rejects import count_reasons, write_rejects
from shards.convert.work_folder import WorkFolder
from shards.errors import ConversionFailed, UserError, explain_os_errors
from shards.files.lock import file_lock
from shards.files.output import check_output_folder
from shards.format.index import Index
from shards.format.manifest import MANIFEST_NAME, REJECTS_NAME, Manifest, tool_version
from shards.format.manifest_fields import ClassEntry, SplitEntry
from shards.images.rules import ImageRules
from shards.progress import Progress
from shards.redact import with_relative_paths
from shards.sources.layouts.webdataset import incomplete_sample_warnings, split_of
from shards.sources.naming.class_warnings import (
    Counts,
    blank_image_warnings,
    class_warnings,
    count_labels,
    rejected_class_warnings,
)
from shards.sources.naming.classes import read_classes
from shards.sources.naming.labels import number_classes
from shards.sources.naming.splits import assign_splits
from shards.sources.unused import MAX_TEXT, merge
from shards.workers.pool import run_jobs


def index_tars(
    tars: list[Path],
    rules: ImageRules,
    classes: Path | None = None,
    max_rejects: float = MAX_REJECTS,
    workers: int | None = None,
    *,
    strict: bool = False,
) -> Manifest:
    """Write an index and a manifest for `tars` into their folder, and return the manifest.

    Args:
        tars: WebDataset tars, all in one folder.
        rules: which images to accept; images are never re-encoded.
        classes: text file with one class per line (see `number_classes`).
        max_rejects: maximum fraction of images that may be rejected.
        workers: number of worker processes; None: one per core.
        strict: fail on warnings about likely mistakes in the tars.

    Raises:
        UserError: the tars are in several folders, or in a finished set; a tar is compressed, damaged or has no
            samples; a split has both JPEGs and pixels; `number_classes` rejects the labels; or there are warnings about
            file names and `strict` is set.
        ConversionFailed: more than `max_rejects` of the images are rejected, or there are warnings and `strict` is set.
    """
    folders = {tar.absolute().parent for tar in tars}
    if len(folders) != 1:
        raise UserError(
            f"the tars are in {len(folders)} folders, but a set is one folder; run 'pipeline index' for each of them"
        )
    (folder,) = folders
    for tar in tars:
        if tar.is_dir():
            raise UserError(f"{tar}: is a folder; specify the tars in it")
    if classes is not None:
        read_classes(classes)  # report errors in the class list before the tars are read, because that is slow
    jobs = [IndexJob(folder / name, rules) for name in sorted({tar.name for tar in tars})]
    named = assign_splits([job.tar for job in jobs], folder)
    notes = [with_relative_paths(note, folder)[:MAX_TEXT] for note in named.all_notes(set(named.splits.values()))]
    warnings = [with_relative_paths(warning, folder)[:MAX_TEXT] for warning in named.warnings]
    work = WorkFolder(folder)
    with explain_os_errors(folder):
        _check_folder(folder, work, jobs)
        remedy = f"an index must be next to its tars; 'pipeline shard {folder} --out SET' writes a set elsewhere"
        check_output_folder(folder, "the tars' folder", remedy)
        print_notes(notes, warnings)
        if strict and warnings:  # fail before the tars are read, because that is slow
            raise UserError(_strict_error(folder, warnings))
        work.create()
        try:
            with file_lock(work.path / "index.lock", f"the index of {folder}"):
                return _index_and_publish(
                    work,
                    jobs,
                    rules=rules,
                    classes=classes,
                    max_rejects=max_rejects,
                    workers=workers,
                    strict=strict,
                    notes=notes,
                    warnings=warnings,
                )
        finally:
            # After a failure, keep the work folder: only it records that this project created the rejects.jsonl.
            if (folder / MANIFEST_NAME).exists() or not work.has_published():
                work.remove()


def _check_folder(folder: Path, work: WorkFolder, jobs: list[IndexJob]) -> None:
    """Reject a folder that is already a set, or in which the new files would replace files of other programs."""
    if (folder / MANIFEST_NAME).exists():
        raise UserError(f"{folder}: is already a shard set; remove its {MANIFEST_NAME} to index the tars again")
    missing = [job.tar for job in jobs if not job.tar.is_file()]
    if missing:
        raise UserError(f"{missing[0]}: no such file")
    if work.load_plan() is not None:
        raise UserError(f"{folder}: contains an unfinished conversion; run its 'pipeline shard' command to finish it")
    work.reject_foreign_files([REJECTS_NAME, *(work.index(split_of(job.tar, folder)).name for job in jobs)])


def _index_and_publish(
    work: WorkFolder,
    jobs: list[IndexJob],
    *,
    rules: ImageRules,
    classes: Path | None,
    max_rejects: float,
    workers: int | None,
    strict: bool,
    notes: list[str],
    warnings: list[str],
) -> Manifest:
    with Progress("indexing", sum(job.tar.stat().st_size for job in jobs), "bytes") as progress:
        indexed = run_jobs(index_tar, jobs, workers, progress)
    kept, rejects = sum(len(one.rows) for one in indexed), [reject for one in indexed for reject in one.rejected]
    if not kept and not rejects:
        raise UserError(f"{work.out}: the tars contain no images with labels")
    numbered = number_classes([one.labels for one in indexed], kept + len(rejects), classes=classes)
    for one, labels in zip(indexed, numbered.labels, strict=True):
        one.rows["label"] = labels[one.rows["label"]]
        one.listed[:] = labels[one.listed]
    _check_same_encoding(work.out, indexed)
    unused = merge(one.unused for one in indexed)
    late = [*incomplete_sample_warnings(unused), *_class_warnings(numbered.classes, indexed)]
    print_notes(warnings=late)
    if strict and late:
        raise ConversionFailed(_strict_error(work.out, late))
    rejects_hash = write_rejects(work, rejects, kept, max_rejects)
    splits: dict[str, list[IndexedTar]] = {}
    for one in indexed:
        if len(one.rows):
            splits.setdefault(one.split, []).append(one)
    if not splits:
        raise ConversionFailed(f"{work.out}: all images were rejected; see {work.out / REJECTS_NAME} for the reasons")
    manifest = Manifest(
        classes=numbered.classes,
        splits={split: _join(work, split, splits[split]) for split in sorted(splits)},
        made={
            "tool": tool_version(),
            "source": "webdataset, indexed in place",
            "shuffled": False,
            "class_run": {split: class_run([one.rows for one in ones]) for split, ones in sorted(splits.items())},
            "options": {"check": rules.check},
            "images": {split: {"rejected": count_reasons(rejects, split)} for split in sorted(splits)},
            "unused": to_unused_records(unused),
            "notes": notes,
            "warnings": [*warnings, *late],
            "rejects_hash": rejects_hash,
        },
    )
    publish_manifest(work, manifest)
    return manifest


def _check_same_encoding(folder: Path, indexed: list[IndexedTar]) -> None:
    """Raise UserError if the tars of a split have both JPEGs and pixels."""
    first: dict[str, IndexedTar] = {}
    for one in indexed:
        other = first.setdefault(one.split, one) if len(one.rows) else one
        if one.pixels != other.pixels:
            tars = f"{other.entry.name}, {one.entry.name}"
            raise UserError(f"{folder}: the tars of split '{one.split}' ({tars}) have {MIXED}")


def _strict_error(folder: Path, warnings: list[str]) -> str:
    return f"{folder}: --strict: {summarize_warnings(warnings)}; correct the tars, or omit --strict"


def _class_warnings(classes: tuple[ClassEntry, ...], found: list[IndexedTar]) -> list[str]:
    listed: dict[str, Counts] = {}
    late: list[str] = []
    for split in sorted({one.split for one in found}):
        ones = [one for one in found if one.split == split]
        listed[split] = count_labels(np.concatenate([one.listed for one in ones]), len(classes))
        kept = count_labels(np.concatenate([one.rows["label"] for one in ones]), len(classes))
        late += rejected_class_warnings(split, classes, listed[split], kept)
        late += blank_image_warnings(split, sum(one.blank for one in ones), int(kept.sum()))
    return [*class_warnings(classes, listed), *late]


def class_run(shards: list[Index]) -> float:
    """Return the mean number of consecutive rows with the same label. For shuffled samples it is slightly above 1."""
    labels = np.concatenate([rows["label"] for rows in shards])
    return round(len(labels) / (1 + np.count_nonzero(labels[1:] != labels[:-1])), 2)


def _join(work: WorkFolder, split: str, found: list[IndexedTar]) -> SplitEntry:
    samples = sum(len(one.rows) for one in found)
    index = work.index(split).name
    digest = work.publish_index(index, samples, (one.rows for one in found))
    return SplitEntry(
        samples=samples,
        shards=tuple(one.entry for one in found),
        index=index,
        index_hash=digest,
        pixels=found[0].pixels,
    )

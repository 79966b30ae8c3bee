"""`pipeline shard`: convert a source into a shard set.

    scan the source -> assign every sample to a shard -> write the shards -> write the index -> write the manifest

The same command resumes a killed conversion: the work folder contains the conversion plan and records of the finished
shards.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from shards.convert.conversion_plan import ConversionPlan, assign_to_shards, library_versions
from shards.convert.join import ConversionResult, join, print_notes, published_names, summarize_warnings
from shards.convert.options import MAX_REJECTS, Options
from shards.convert.parts import ALL_SHARDS, ConversionPart, lock_part
from shards.convert.pixel_size import describe_size, expect_bytes
from shards.convert.source_check import (
    check_exists,
    check_finished,
    check_same_source,
    check_unchanged,
    folder_times,
    source_name,
)
from shards.convert.work_folder import WorkFolder
from shards.convert.writer import ShardJob, write_shard
from shards.errors import ConversionFailed, UserError, explain_os_errors
from shards.files.lock import file_lock
from shards.format.manifest import MANIFEST_NAME, Manifest, tool_version
from shards.progress import Progress
from shards.redact import with_relative_paths
from shards.sources.layouts.detect import detect_layout, scan
from shards.sources.naming.split_folders import find_split_folders
from shards.sources.scan import Layout
from shards.sources.unused import MAX_TEXT
from shards.sources.walk import cached_folder_listings
from shards.workers.pool import run_jobs

LISTING_WAIT = 4 * 3600.0
"""Timeout in seconds for another process of the same conversion that is listing or unpacking the source."""


def convert(source: Path, out: Path, options: Options, part: ConversionPart | None = None) -> ConversionResult | None:
    """Convert `source` into the shard set `out`, or resume an unfinished conversion.

    Args:
        part: write only this part of the shards and no manifest; `finish` joins the parts.

    Returns:
        The manifest and counts; None for a part, and if the set was already complete.

    Raises:
        UserError: the source or the options are invalid, or either has changed since the conversion started.
        ConversionFailed: the conversion could not be finished; the same command resumes it.
    """
    work = WorkFolder(out, options.format != "ffcv")
    with explain_os_errors(out):
        _check_output_is_folder(out)
        if (out / MANIFEST_NAME).exists():
            manifest = Manifest.load(out)
            _check_same_options(out, manifest.made.get("options"), options)
            _accept_finished(work, manifest, source, options.scan.layout, strict=options.strict)
            return None
        saved = work.load_plan()
        if saved is None:
            check_exists(source)
        plan = saved or _plan(source, work, options)
        _check_same_options(out, plan.options, options)
        _check_plan(work, plan, source, options.scan.layout)
        if saved:
            is_needed = partial(_is_unfinished, work, _jobs(plan, part or ALL_SHARDS))
            check_unchanged(work, plan, source, is_needed, times_first=part is not None)
        print_notes([*plan.notes, *([describe_size(work, plan)] if plan.rules.pixels else [])], plan.warnings)
        if options.strict:
            _fail_on_warnings(source, plan.warnings)
        with lock_part(work, part or ALL_SHARDS):
            _write_shards(work, plan, options, part or ALL_SHARDS)
            if part:
                return None
            return join(work, plan, options.max_rejects, options.workers, strict=options.strict)


def finish(
    out: Path,
    max_rejects: float = MAX_REJECTS,
    workers: int | None = None,
    *,
    source: Path | None = None,
    strict: bool = False,
) -> ConversionResult | None:
    """Join the parts of a conversion into a set.

    Args:
        source: source of the parts, to check that it is the same and unchanged; None: not checked.
        strict: fail if the source probably contains a mistake.

    Returns:
        The manifest and counts; None if the set was already complete.

    Raises:
        UserError: the parts were converted from a different source.
        ConversionFailed: some shards are missing, because their parts have not run or failed.
    """
    work = WorkFolder(out)
    with explain_os_errors(out):
        if (out / MANIFEST_NAME).exists():
            _accept_finished(work, Manifest.load(out), source, strict=strict)
            return None
        plan = work.load_plan()
        if plan is None:
            raise UserError(f"{out}: no parts to finish; first run 'pipeline shard SOURCE --out {out} --part K/N'")
        work = WorkFolder(out, plan.keeps_tars)
        _check_plan(work, plan, source)
        if source is not None:
            check_unchanged(work, plan, source, partial(_is_unfinished, work, plan.jobs))
        missing = [work.tar(split, shard).name for split, shard in plan.jobs if not work.is_done(split, shard)]
        if missing:
            raise ConversionFailed(
                f"{out}: {len(missing):,} of {len(plan.jobs):,} shards are missing (first: {missing[0]}); run their "
                "parts again, or run the command without --part and --finish to write them all"
            )
        if strict:
            _fail_on_warnings(source or Path(plan.source), plan.warnings)
        with file_lock(work.path / "finish.lock", f"the last step of the conversion {out}"):
            return join(work, plan, max_rejects, workers, strict=strict)


def default_out(source: Path) -> Path:
    """Return the default output folder: `imagenet-shards` next to `imagenet/`, and `data-shards` next to `data.tar`.

    For a symbolic link, it is next to the link, because its target may be in a shared folder. If the source was removed
    after the conversion, the existing set decides whether it was a file (suffix removed) or a folder.

    Raises:
        UserError: the source is the root folder, which has no name.
    """
    source = source.absolute()
    if source.name in ("", ".."):
        source = source.resolve()
    if not source.name:
        raise UserError(f"{source}: no default name for the set; specify its folder with --out")
    of_file, of_folder = (source.with_name(f"{name}-shards") for name in (source.stem, source.name))
    removed = not source.exists() and of_file.exists() and not of_folder.exists()
    return of_file if source.is_file() or removed else of_folder


def _plan(source: Path, work: WorkFolder, options: Options) -> ConversionPlan:
    """Scan the source, assign samples to shards and save the plan in one process, while the other processes wait."""
    if work.out.exists() and not all(path.name.startswith(".") for path in work.out.iterdir()):
        raise UserError(f"{work.out}: is not empty and not a shard set; specify another --out, or remove it")
    work.create()
    with file_lock(work.path / "scan.lock", f"the listing of {source}", wait=LISTING_WAIT):
        plan = work.load_plan()
        if plan is None:
            try:
                plan = _scan(source, work, options)
                if options.strict and plan.warnings:
                    print_notes(warnings=plan.warnings)
                    _fail_on_warnings(source, plan.warnings)
                if options.rules.pixels:
                    plan = replace(plan, expected_bytes=expect_bytes(work, plan, options.workers))
            except UserError as error:
                if error.exit_code == UserError.exit_code:  # the input is invalid, so there is nothing to resume
                    work.remove()
                    with suppress(OSError):
                        work.out.rmdir()
                raise
            work.save_plan(plan)
        return plan


def _check_outside(out: Path, source: Path) -> None:
    """Reject an output folder inside the source's class folders, where the next scan would read it as a class."""
    for root in find_split_folders(source).roots.values():
        inside = os.path.relpath(out.resolve(), root.resolve())
        if not inside.startswith("."):
            raise UserError(
                f"--out {out}: is inside {root}, where it would be read as a class folder; specify a folder "
                "outside the source"
            )


@cached_folder_listings()
def _scan(source: Path, work: WorkFolder, options: Options) -> ConversionPlan:
    key = json.dumps([tool_version(), source_name(source), options.scan.layout, options.changing_bytes], sort_keys=True)
    spool = work.begin_scan(key)  # created before listing, so that folders modified later have a newer time
    layout = detect_layout(source.absolute())
    if (options.scan.layout or layout) == "folder":
        _check_outside(work.out, source.absolute())
    found = scan(source.absolute(), options.scan, spool)
    shards = {}
    files: dict[str, str] = {}
    for split, listing in found.splits.items():
        arranged, bounds = assign_to_shards(listing, split, options.scan.seed, options.shard_bytes)
        files |= work.save_listing(split, arranged, bounds)
        shards[split] = len(bounds) - 1
    return ConversionPlan(
        tool=tool_version(),
        options=options.changing_bytes,
        source=source_name(source),
        layout=found.layout,
        digest=found.digest,
        classes=found.classes,
        shards=shards,
        unused=found.unused,
        notes=tuple(with_relative_paths(line, source)[:MAX_TEXT] for line in found.notes),
        warnings=tuple(with_relative_paths(line, source)[:MAX_TEXT] for line in found.warnings),
        folders=folder_times(found.splits, source.absolute(), work.out.absolute()),
        source_files=found.files,
        files=files,
        libraries=library_versions(options.rules),
    )


def _check_output_is_folder(out: Path) -> None:
    """Reject an output path that is not a folder, or whose parent is not a folder."""
    for path in (out, *out.parents):
        with suppress(FileNotFoundError, NotADirectoryError):
            if not stat.S_ISDIR(path.stat().st_mode):
                raise UserError(f"{path}: is a file, expected a folder; specify another --out")
            return


def _check_same_options(out: Path, saved: dict[str, Any] | None, options: Options) -> None:
    requested, used = options.changing_bytes, saved or {}
    if used != requested:
        differing = ", ".join(
            f"{name} was {used.get(name)}, now {requested.get(name)}"
            for name in {**requested, **used}
            if used.get(name) != requested.get(name)
        )
        raise UserError(
            f"{out}: contains a conversion with other options ({differing}); use the same options, specify another "
            "--out, or remove the folder"
        )


def _fail_on_warnings(source: Path, warnings: Sequence[str]) -> None:
    """Raise an error if there are warnings about likely mistakes in the source.

    Raises:
        UserError: there are warnings; the message contains the first one.
    """
    if warnings:
        raise UserError(f"{source}: --strict: {summarize_warnings(warnings)}; correct the source, or omit --strict")


def _accept_finished(
    work: WorkFolder, manifest: Manifest, source: Path | None, layout: Layout | None = None, *, strict: bool
) -> None:
    """Check that a finished set was converted from `source`, and remove what remains of its work folder."""
    if source is not None:
        check_finished(work, manifest, source, layout)
    if strict:
        _fail_on_warnings(source or work.out, manifest.made.get("warnings", ()))
    work.remove()


def _check_plan(work: WorkFolder, plan: ConversionPlan, source: Path | None, layout: Layout | None = None) -> None:
    """Check the plan's source, tool version and listing, and that no file of another program would be replaced."""
    if source is not None:
        check_same_source(work.out, plan, source, layout)
    if plan.tool != tool_version():
        raise UserError(
            f"{work.out}: contains a conversion that was started by {plan.tool}, but this is {tool_version()}; resume "
            f"it with {plan.tool}, or remove the folder"
        )
    plan.check_libraries(work.out)
    work.check_listing(plan)
    work.reject_foreign_files(published_names(work, plan))


def _jobs(plan: ConversionPlan, part: ConversionPart) -> list[tuple[str, int]]:
    """Return the shards of a part."""
    return plan.jobs[part.number - 1 :: part.of]


def _is_unfinished(work: WorkFolder, jobs: Sequence[tuple[str, int]]) -> bool:
    return not all(work.is_done(split, shard) for split, shard in jobs)


def _write_shards(work: WorkFolder, plan: ConversionPlan, options: Options, part: ConversionPart) -> None:
    mine = _jobs(plan, part)
    todo = [ShardJob(work, split, shard, options.rules) for split, shard in mine if not work.is_done(split, shard)]
    for job in todo:
        work.reject_foreign_shards(job.split, [job.shard])
    images = 0
    for job in todo:
        _, bounds = work.load_listing(job.split)
        images += int(bounds[job.shard + 1] - bounds[job.shard])
    with Progress("sharding", images) as progress:
        run_jobs(write_shard, todo, options.workers, progress)

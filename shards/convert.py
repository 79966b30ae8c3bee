"""`pipeline shard`: a source becomes a shard set.

    scan the source -> fix which sample goes to which shard -> write the shards -> join the index -> manifest

A killed conversion resumes with the same command: what was decided and what is done stand in the work folder.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import xxhash

from shards.beton import BetonOptions
from shards.errors import ConversionFailed, UserError, explained
from shards.images import ImageRules
from shards.join import Outcome, first_of, join, published_names, say_notes
from shards.listing import display_name
from shards.lock import hold
from shards.manifest import MANIFEST_NAME, Manifest, tool
from shards.order import arrange
from shards.parts import WHOLE, Part, hold_part
from shards.pool import run_jobs
from shards.progress import Progress
from shards.redact import one_line
from shards.regular import read_list
from shards.rejects import MAX_REJECTS
from shards.sources.classes import MAX_LIST, quoted, shortened
from shards.sources.recognise import current_digest, recognise, scan
from shards.sources.scan import Layout, ScanOptions
from shards.sources.split_folders import find_split_folders
from shards.sources.unused import MAX_TEXT
from shards.work import Plan, Work
from shards.writer import ShardJob, write_shard

MIB = 2**20
LISTING_WAIT = 4 * 3600.0
"""Seconds that a part of a conversion waits for another process that lists the source, or unpacks it."""
_LOOKED_AT = 10_000  # folders of the source; a source may have one for every image
_PATH = r"(?<![^\s'\"(])"  # at the beginning of a path
Format = Literal["tar", "ffcv", "both"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a set is to be made."""

    scan: ScanOptions = field(default_factory=ScanOptions)
    shard_bytes: int = 256 * MIB
    rules: ImageRules = field(default_factory=ImageRules)
    max_rejects: float = MAX_REJECTS
    strict: bool = False
    """Refuse a source with doubts."""
    format: Format = "tar"
    beton: BetonOptions = field(default_factory=BetonOptions)

    @property
    def workers(self) -> int | None:
        return self.scan.workers

    @property
    def changing_bytes(self) -> dict[str, Any]:
        classes = self.scan.classes
        return {
            "seed": self.scan.seed,
            "shard_bytes": self.shard_bytes,
            "val_fraction": self.scan.val_fraction,
            "classes": classes and xxhash.xxh3_64_hexdigest(read_list(classes, MAX_LIST, "a list of classes").encode()),
            "format": self.format,
            "beton": None if self.format == "tar" else asdict(self.beton),
            **asdict(self.rules),
        }


def convert(source: Path, out: Path, options: Options, part: Part | None = None) -> Outcome | None:
    """Convert `source` into the shard set `out`, or finish what was begun there.

    Args:
        part: make this share of the shards only, and no manifest; `finish` joins the parts.

    Returns:
        What was made; None for a part, and when the set was already complete.

    Raises:
        UserError: the source or the options do not fit.
        ConversionFailed: the job could not be finished; the same command resumes it.
    """
    work = Work(out, options.format != "ffcv")
    with explained(out):
        _check_place(out)
        _check_exists(source)
        if (out / MANIFEST_NAME).exists():
            manifest = Manifest.load(out)
            _check_same(out, manifest.made.get("options"), options)
            _check_made_from(out, manifest, source, options.scan.layout)
            work.close()
            return None
        begun = work.load_plan()
        plan = begun or _plan(source, work, options)
        _check_same(out, plan.options, options)
        _check_source(out, plan, source, options.scan.layout)
        _check_tool(out, plan)
        work.check_listing(plan)
        work.refuse_foreign(published_names(work, plan))
        changes = _changes(work, plan, source, part) if begun else ()
        say_notes((*plan.notes, *plan.doubts, *changes))
        if options.strict:
            _refuse_doubts(source, (*plan.doubts, *changes))
        with hold_part(work, part or WHOLE):
            _write_shards(work, plan, options, part or WHOLE)
            if part:
                return None
            return join(work, plan, options.max_rejects, options.workers, strict=options.strict, changes=changes)


def finish(
    out: Path,
    max_rejects: float = MAX_REJECTS,
    workers: int | None = None,
    *,
    source: Path | None = None,
    strict: bool = False,
) -> Outcome | None:
    """Join the parts of a conversion into a set.

    Args:
        source: what the parts were made from; another is refused. None = whatever that was.
        strict: refuse a set with doubts.

    Returns:
        What was made; None when the set was already complete.

    Raises:
        UserError: the set is of another source.
        ConversionFailed: shards are still to be made, by parts that have not run or not ended well.
    """
    work = Work(out)
    with explained(out):
        if source is not None:
            _check_exists(source)
        if (out / MANIFEST_NAME).exists():
            manifest = Manifest.load(out)
            if source is not None:
                _check_made_from(out, manifest, source)
            work.close()
            return None
        plan = work.load_plan()
        if plan is None:
            raise UserError(f"{out}: nothing was begun here; run 'pipeline shard SOURCE --out {out} --part K/N' first")
        if source is not None:
            _check_source(out, plan, source)
        _check_tool(out, plan)
        work = Work(out, plan.keeps_tars)
        work.check_listing(plan)
        work.refuse_foreign(published_names(work, plan))
        missing = [work.tar(split, shard).name for split, shard in plan.jobs if not work.is_done(split, shard)]
        if missing:
            raise ConversionFailed(
                f"{out}: {len(missing):,} of {len(plan.jobs):,} shards are not made yet ({missing[0]} is the first); "
                "run their parts again, or all that is left without --part"
            )
        if strict:
            _refuse_doubts(source or Path(plan.source), plan.doubts)
        with hold(work.path / "finish.lock", f"the end of {out}"):
            return join(work, plan, max_rejects, workers, strict=strict)


def default_out(source: Path) -> Path:
    """`imagenet/` -> `imagenet-shards` beside it; of a link beside the link, as its target may lie where others write.

    Raises:
        UserError: the source is the root folder.
    """
    source = source.absolute()
    if source.name in ("", ".."):  # a folder without a name of its own here
        source = source.resolve()
    if not source.name:
        raise UserError(f"{source}: has no name to call the set after; name its folder with --out")
    return source.with_name((source.stem if source.is_file() else source.name) + "-shards")


def _plan(source: Path, work: Work, options: Options) -> Plan:
    """Scan, arrange and remember; of several processes that begin together one does it, the others wait for it."""
    if work.out.exists() and not all(path.name.startswith(".") for path in work.out.iterdir()):
        raise UserError(f"{work.out}: not empty and no shard set; choose another --out or remove it")
    layout = recognise(source)
    if (options.scan.layout or layout) == "folder":
        _check_outside(work.out, source)
    work.make()
    with hold(work.path / "scan.lock", f"the listing of {source}", wait=LISTING_WAIT):
        plan = work.load_plan()
        if plan is None:
            try:
                plan = _scan(source, work, options)
                if options.strict and plan.doubts:
                    say_notes(plan.doubts)
                    _refuse_doubts(source, plan.doubts)
            except UserError as error:
                if error.exit_code == UserError.exit_code:  # another start would meet the same
                    work.close()
                    with suppress(OSError):
                        work.out.rmdir()
                raise
            work.save_plan(plan)
        return plan


def _check_outside(out: Path, source: Path) -> None:
    """Refuse a place for the set that would be read as a class folder of the source, or as part of one."""
    for root in find_split_folders(source).roots.values():
        inside = os.path.relpath(out.resolve(), root.resolve())
        if not inside.startswith("."):
            raise UserError(
                f"--out {out}: lies among the class folders of {root}, where it would be read as a class; choose a "
                "folder outside the source"
            )


def _scan(source: Path, work: Work, options: Options) -> Plan:
    key = json.dumps([tool(), _source_name(source), options.scan.layout, options.changing_bytes], sort_keys=True)
    found = scan(source.absolute(), options.scan, work.begin_scan(key))
    shards = {}
    files: dict[str, str] = {}
    for split, listing in found.splits.items():
        arranged, bounds = arrange(listing, split, options.scan.seed, options.shard_bytes)
        files |= work.save_listing(split, arranged, bounds)
        shards[split] = len(bounds) - 1
    return Plan(
        tool=tool(),
        options=options.changing_bytes,
        source=_source_name(source),
        layout=found.layout,
        digest=found.digest,
        classes=found.classes,
        shards=shards,
        unused=found.unused,
        notes=tuple(_without_place(line, source) for line in found.notes),
        doubts=tuple(_without_place(line, source) for line in found.doubts),
        files=files,
    )


def _source_name(source: Path) -> str:
    return display_name(os.fsencode(source.resolve()))


def _without_place(line: str, source: Path) -> str:
    """Return a line about the source with paths below it, as they are kept in dataset.json: a copy gives the same."""
    here, above = (re.escape(str(path)) for path in (source.absolute(), source.absolute().parent))
    line = re.sub(rf"{_PATH}{here}/", "", line)
    line = re.sub(rf"{_PATH}{here}(?![^\s:;,'\")])", "the source", line)
    if above != "/":
        line = re.sub(rf"{_PATH}{above}/", "", line)
    return one_line(line)[:MAX_TEXT]


def _check_exists(source: Path) -> None:
    if not source.exists():
        raise UserError(f"{source}: no such file or folder; give the source that the set is to be made from")


def _check_place(out: Path) -> None:
    """Reject an output path that is not a folder, or whose parent is not a folder."""
    for path in (out, *out.parents):
        with suppress(FileNotFoundError, NotADirectoryError):
            if not stat.S_ISDIR(path.stat().st_mode):
                raise UserError(f"{path}: a file, where a folder is needed; choose another --out")
            return


def _check_source(out: Path, plan: Plan, source: Path, layout: Layout | None = None) -> None:
    """Refuse to resume from another source than that with which the conversion began."""
    if plan.source != _source_name(source):
        raise UserError(f"{out}: was begun from {plan.source}, not from {source}; give that, or another --out")
    if layout not in (None, plan.layout):
        raise UserError(
            f"{out}: was begun from a source read as '{plan.layout}', not '{layout}'; leave out --from, "
            "or give another --out"
        )


def _check_made_from(out: Path, manifest: Manifest, source: Path, layout: Layout | None = None) -> None:
    """Refuse to take a finished set for that of another source, or of one that has changed since. Lists the source."""
    made = next((one for one in get_args(Layout) if one == manifest.made.get("source")), None)
    if made is None:
        raise UserError(f"{out}: is a set that 'pipeline shard' did not make; give another --out")
    if layout not in (None, made):
        raise UserError(
            f"{out}: is a set made from a source read as '{made}', not '{layout}'; leave out --from, or give another "
            "--out"
        )
    if _digest_now(source, made) != manifest.made.get("source_digest"):
        folders = [quoted(entry.folder) for entry in manifest.classes]
        raise UserError(
            f"{out}: is a set made from another source than {source}, or from what that held before it was changed "
            f"(the set has the classes {shortened(folders)}); give another --out, or remove {out} to make it anew"
        )


def _changes(work: Work, plan: Plan, source: Path, part: Part | None) -> tuple[str, ...]:
    """Return doubts about a source that is not what it was when it was listed, as a resumed conversion does not see.

    A part looks at the times of folders only: many parts that list a source at once would overload its server.
    """
    if part is None and _digest_now(source, plan.layout) == plan.digest:
        return ()
    changed = []
    for split in plan.shards:
        listing, _ = work.load_listing(split)
        for container in listing.containers[:_LOOKED_AT]:
            with suppress(OSError):  # said by the shard that needs it
                status = container.path.stat()
                if stat.S_ISDIR(status.st_mode) and int(status.st_mtime) != container.mtime:
                    changed.append(container.path)
    if changed:
        what = f"{changed[0]}: files came or went since it was listed ({len(changed):,} such folders)"
    elif part is None:
        what = "the source was changed since it was listed"
    else:
        return ()
    return (_without_place(f"{what}; the set is made of what was listed", source),)


def _digest_now(source: Path, layout: Layout) -> str | None:
    """Return the digest of the source as it is now; None where it cannot be read as of that layout."""
    try:
        return current_digest(source.absolute(), layout)
    except UserError as error:
        if error.exit_code != UserError.exit_code:  # the storage failed
            raise
        return None


def _check_same(out: Path, made_with: dict[str, Any] | None, options: Options) -> None:
    asked, was = options.changing_bytes, made_with or {}
    if was != asked:
        differing = ", ".join(f"{name} {was.get(name)}" for name in asked if was.get(name) != asked[name])
        raise UserError(
            f"{out}: was begun with other options ({differing}); give the same, or another --out, or remove it"
        )


def _refuse_doubts(source: Path, doubts: Sequence[str]) -> None:
    """Reject a source in which something may well be a mistake.

    Raises:
        UserError: names the first doubt.
    """
    if doubts:
        raise UserError(f"{source}: --strict: {first_of(doubts)}; correct the source, or leave --strict out")


def _check_tool(out: Path, plan: Plan) -> None:
    if plan.tool != tool():
        raise UserError(f"{out}: was begun by {plan.tool}, and this is {tool()}; go on with that, or remove it")


def _write_shards(work: Work, plan: Plan, options: Options, part: Part) -> None:
    mine = plan.jobs[part.number - 1 :: part.of]
    todo = [ShardJob(work, split, shard, options.rules) for split, shard in mine if not work.is_done(split, shard)]
    for job in todo:
        work.refuse_foreign_shards(job.split, [job.shard])
    images = 0
    for job in todo:
        _, bounds = work.load_listing(job.split)
        images += int(bounds[job.shard + 1] - bounds[job.shard])
    with Progress("sharding", images) as progress:
        run_jobs(write_shard, todo, options.workers, progress)

"""`pipeline shard`: a source becomes a shard set.

    scan the source -> fix which sample goes to which shard -> write the shards -> join the index -> manifest

A killed conversion resumes with the same command: what was decided and what is done stand in the work folder.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shards.errors import UserError
from shards.images import ImageRules
from shards.join import Outcome, join
from shards.manifest import MANIFEST_NAME, Manifest
from shards.order import arrange
from shards.pool import run_jobs
from shards.progress import Progress
from shards.sources import scan
from shards.work import Plan, Work
from shards.writer import ShardJob, explain, write_shard

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a set is to be made."""

    seed: int = 0
    shard_bytes: int = 256 * MIB
    rules: ImageRules = field(default_factory=ImageRules)
    max_rejects: float = 0.001
    workers: int | None = None

    @property
    def changing_bytes(self) -> dict[str, Any]:
        return {"seed": self.seed, "shard_bytes": self.shard_bytes, **asdict(self.rules)}


def convert(source: Path, out: Path, options: Options) -> Outcome | None:
    """Convert `source` into the shard set `out`, or finish what was begun there.

    Returns:
        None when the set was already complete.

    Raises:
        UserError: the source or the options do not fit.
        ConversionFailed: the job could not be finished; the same command resumes it.
    """
    try:
        if (out / MANIFEST_NAME).exists():
            _check_same(out, Manifest.load(out).made.get("options"), options)
            return None
        work = Work(out)
        plan = work.load_plan() or _plan(source, work, options)
        _check_same(out, plan.options, options)
        for note in plan.notes:
            print(f"note: {note}")
        _write_shards(work, plan, options)
        return join(work, plan, options.max_rejects)
    except OSError as error:
        raise explain(error, out) from error


def default_out(source: Path) -> Path:
    """`imagenet/` -> `imagenet-shards` beside it."""
    source = source.resolve()
    return source.with_name(source.name + "-shards")


def _plan(source: Path, work: Work, options: Options) -> Plan:
    """Scan, arrange and remember."""
    found = scan(source)
    if work.out.exists() and any(path != work.path for path in work.out.iterdir()):
        raise UserError(f"{work.out}: not empty and no shard set; choose another --out or remove it")
    work.path.mkdir(parents=True, exist_ok=True)
    shards = {}
    for split, listing in found.splits.items():
        arranged, bounds = arrange(listing, split, options.seed, options.shard_bytes)
        work.save_listing(split, arranged, bounds)
        shards[split] = len(bounds) - 1
    plan = Plan(
        options=options.changing_bytes,
        kind=found.kind,
        classes=found.classes,
        shards=shards,
        ignored=found.ignored,
        notes=found.notes,
    )
    work.save_plan(plan)
    return plan


def _check_same(out: Path, made_with: dict[str, Any] | None, options: Options) -> None:
    asked = options.changing_bytes
    if made_with != asked:
        differing = [name for name in asked if (made_with or {}).get(name) != asked[name]]
        was = ", ".join(f"{name} {(made_with or {}).get(name)}" for name in differing)
        raise UserError(f"{out}: was begun with other options ({was}); give the same, or another --out, or remove it")


def _write_shards(work: Work, plan: Plan, options: Options) -> None:
    todo = [
        ShardJob(work.out, split, shard, options.rules) for split, shard in plan.jobs if not work.is_done(split, shard)
    ]
    images = 0
    for job in todo:
        _, bounds = work.load_listing(job.split)
        images += int(bounds[job.shard + 1] - bounds[job.shard])
    if not todo:
        return
    workers = options.workers or len(os.sched_getaffinity(0))
    with Progress("sharding", images) as progress:
        run_jobs(write_shard, todo, min(workers, len(todo)), progress)

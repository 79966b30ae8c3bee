"""Describe from which checkpoint a run would resume, before it is started."""

from __future__ import annotations

from collections.abc import Iterator

from launch.feed import Feed
from launch.resume.check import check_resume
from launch.resume.decision import ResumeDecision, branch_again
from launch.resume.fingerprint import fingerprint
from launch.resume.set_aside import is_later
from launch.run.checkpoint_folder import CHECKPOINTS, CheckpointFolder
from launch.run.origin import read_origins


def preview_resume(decision: ResumeDecision, feed: Feed, teacher: str | None) -> Iterator[str]:
    """Yield messages about the checkpoint that a run would resume from. Changes nothing.

    Args:
        teacher: digest of the weights of the distillation's teacher; None: no distillation.

    Raises:
        UserError: the checkpoint does not fit the run, or cannot be read.
    """
    out = feed.recipe.run.out
    checkpoints = CheckpointFolder(out / CHECKPOINTS)
    yield from decision.messages
    newest, skipped = checkpoints.newest() if decision.kind in ("newest", "never") else (None, [])
    if decision.kind == "newest":
        yield from (f"warning: {message}" for message in skipped)
        if feed.recipe.checkpoint.local_checkpoint_every is not None and checkpoints.newest_described() is not None:
            yield (
                "if the host of rank 0 has a newer local checkpoint, it is used instead; a dry run does not look for "
                "one"
            )
        if newest is None and (branch := read_origins(out).branch) is not None:
            yield "warning: all checkpoints are damaged"
            decision = branch_again(branch)
    if decision.kind in ("rewind", "branch"):
        found, warnings = decision.open()
        yield from warnings
    elif newest is None or decision.kind == "never":
        if newest is not None or skipped:
            yield f"starting in {out}, whose checkpoints and metrics would be moved to {checkpoints.next_archive()}"
        return
    else:
        found = newest
    yield from check_resume(decision, found, feed, fingerprint(feed.recipe, feed, teacher=teacher))
    yield f"{decision.describe(found, out)}, after {found.progress.step:,} of {feed.last_step:,} steps"
    if decision.kind == "rewind" and is_later(out, checkpoints, found.progress.step):
        later = ", ".join(f"{step:,}" for step in checkpoints.paths() if step > found.progress.step)
        names = f"the checkpoints of the steps {later}, and " if later else ""
        yield f"{names}weights and evaluations of later steps would be moved to {checkpoints.next_archive()}"

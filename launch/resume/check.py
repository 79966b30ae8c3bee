"""Check that a start may resume from a checkpoint."""

from __future__ import annotations

from launch.feed import Feed
from launch.resume.decision import ResumeDecision
from launch.resume.fingerprint import check_branch, check_classes, check_fingerprint, check_position
from launch.resume.length import check_length, describe_schedule
from launch.run.checkpoint import Checkpoint, Fingerprint


def check_resume(decision: ResumeDecision, found: Checkpoint, feed: Feed, current: Fingerprint) -> list[str]:
    """Check that a start may resume from a checkpoint; return messages about options that have changed.

    Args:
        current: fingerprint of the start.

    Raises:
        CheckpointError: model, data or options do not fit the checkpoint, or the run is too short.
    """
    check_classes(found, feed.class_list, run=decision.run)
    changed = (check_branch if decision.kind == "branch" else check_fingerprint)(found, current)
    check_position(found, feed.plan.steps_per_epoch)
    check_length(found, feed, decision)
    warnings = [f"warning: {fact}; the run continues with the new value" for fact in changed]
    return warnings + describe_schedule(found, feed, current)

"""Check that a checkpoint fits the length of a run, and describe how its learning-rate schedule changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from launch.config.optim import OptimConfig
from launch.feed import Feed
from launch.optim.schedule import lr_schedule
from launch.resume.decision import ResumeDecision
from launch.run.checkpoint import Checkpoint, CheckpointError, Fingerprint
from shards.errors import UserError

# Options of the schedule, by their names in the fingerprint.
_SCHEDULE = ("epochs", "lr", "warmup_lr", "min_lr", "warmup_epochs", "schedule", "decay_fraction")


def check_length(found: Checkpoint, feed: Feed, decision: ResumeDecision) -> None:
    """Check that the run does not end before the step of a checkpoint, and a branch not with it.

    Raises:
        CheckpointError: the run is too short; the message names the option to change.
    """
    step, total, optim = found.progress.step, feed.total_steps, feed.recipe.optim
    # With a --stop-after below its progress, a run that is resumed ends without further steps.
    end = total if decision.kind == "newest" else feed.last_step
    needed = step + (decision.kind == "branch")
    if needed <= end:
        return
    if end < total:
        given, remedy = f"--stop-after {end}", f"--stop-after {needed}"
    else:
        given, remedy = f"--epochs {optim.epochs}", f"--epochs {-(-needed // feed.plan.steps_per_epoch)}"
    if decision.kind == "newest":
        raise CheckpointError(
            f"{given}: the run has done {step:,} steps, which is more than the {end:,} of {_epochs(optim)}; use at "
            f"least {remedy}, or return to an earlier checkpoint with --resume step:N"
        )
    raise CheckpointError(
        f"--resume {decision.request}: with {given}, the run ends after step {end:,}, but the checkpoint is that of "
        f"step {step:,}; use at least {remedy}, or choose an earlier checkpoint"
    )


def describe_schedule(found: Checkpoint, feed: Feed, current: Fingerprint) -> list[str]:
    """Return a message about the learning rates before and after a checkpoint, if the schedule has changed."""
    before, now = ({name: each.free.get(name) for name in _SCHEDULE} for each in (found.fingerprint, current))
    step, optim = found.progress.step, feed.recipe.optim
    if before == now or not 0 < step < feed.last_step:
        return []
    values: dict[str, Any] = before
    try:
        earlier = replace(optim, **values)
        sizes = {"global_batch": feed.plan.global_batch, "steps_per_epoch": feed.plan.steps_per_epoch}
        last, following = lr_schedule(earlier, **sizes)(step - 1), lr_schedule(optim, **sizes)(step)
    except (UserError, TypeError):  # the checkpoint's options contradict the others of this start
        return []
    return [
        f"learning rate: {last:.3e} in step {step:,}, {following:.3e} in the next one; the schedule is now "
        f"{_describe(optim)}, before {_describe(earlier)}"
    ]


def _describe(optim: OptimConfig) -> str:
    return f"{optim.resolved_schedule} over {_epochs(optim)}"


def _epochs(optim: OptimConfig) -> str:
    return f"{optim.epochs} epoch{'s' if optim.epochs > 1 else ''}"

"""Checks of a training run before its job is queued, with the files that this machine sees."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from launch.config.recipe import Recipe
from launch.engine.execution import Execution
from launch.feed import Feed
from launch.machine.world import World
from launch.prepare import build_parts
from launch.resume.decision import decide_resume
from launch.resume.preview import preview_resume
from launch.slurm.job import Submit, SubmitError, fits
from shards.errors import UserError


def check_training(job: Submit, recipe: Recipe) -> Iterator[str]:
    """Check what training checks at its start, for the world size of the job; yield warnings.

    Whether the job's nodes see the same files is not known, so that a wrong data set, checkpoint, weights file or
    teacher is a warning. A data set on a server is not opened. Memory and devices are not checked: those of this
    machine differ.

    Raises:
        UserError: the options contradict each other, whatever the files.
    """
    if job.seconds <= recipe.preempt.preempt_margin:
        raise SubmitError(
            f"--time {job.time}: with --preempt-margin {recipe.preempt.preempt_margin:g} (seconds), training would "
            "stop at its start; use a longer time, or a shorter --preempt-margin"
        )
    *_, (_, nodes, processes) = fits(recipe, job)
    device = torch.device("cuda" if job.gpus_per_node else "cpu")  # only its type is used
    world = World(rank=0, size=nodes * processes, local_rank=0, local_size=processes, device=device)
    Execution.of(recipe, device, accumulation=1, ranks=world.size)
    try:
        decision = decide_resume(recipe.run.out, recipe.checkpoint.resume)
        if not isinstance(recipe.data.location(), Path):
            return
        feed = Feed.of(recipe, world)
        parts = build_parts(feed)
        preview_resume(decision, feed, parts.teacher.digest if parts.teacher else None)
    except UserError as error:
        yield f"the job fails unless its nodes have other files: {error}"

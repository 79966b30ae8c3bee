"""Detect a folder that training did not create, before a run overwrites files in it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from launch.run.checkpoint_folder import CheckpointFolder
from launch.run.files import read_regular
from launch.run.metrics_file import read_metrics
from launch.run.saved_recipe import MAX_BYTES, RECIPE_NAME
from launch.run.status import BEFORE_NAME, STATUS_NAME, read_content
from shards.errors import StorageFailed, UserError
from shards.schema import parse_json

# Files that a run replaces, appends to or removes.
_WRITTEN = re.compile(
    r"recipe\.json|origin\.json|classes\.json|status|metrics\.jsonl|curves\.png|(weights(-[a-z]+)*|evaluation)\.safetensors"
    r"|(first-batch|hardest)\.jpg|(tensorboard|wandb|mlflow|trackio)-id|stacks-rank\d+\.txt"
)
_OBJECT: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])


def check_run_folder(run: Path) -> None:
    """Check that a run may write to its folder: the folder is a run folder, or has no files with a run's file names.

    A single valid file identifies a run folder, because the other files may be damaged. Empty files do not count.

    Raises:
        UserError: the folder has files that another program wrote.
    """
    try:
        names = os.listdir(run)
    except OSError:  # it does not exist; or it cannot be read, which the lock of the folder reports
        return
    found = sorted(name for name in names if _WRITTEN.fullmatch(name) and _has_content(run / name))
    if found and not _is_run_folder(run):
        others = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise UserError(
            f"{run}: is not a run folder, but contains {found[0]}{others}, which training would overwrite; use another "
            "run folder (--out), or move the files away"
        )


def _has_content(path: Path) -> bool:
    try:
        return path.is_file() and path.stat().st_size > 0
    except OSError:
        return False


def _is_run_folder(run: Path) -> bool:
    """Return whether a file of a run is valid, or the folder has checkpoints."""
    if any(read_content(run, name) for name in (STATUS_NAME, BEFORE_NAME)):
        return True
    try:
        recipe = parse_json(read_regular(run / RECIPE_NAME, limit=MAX_BYTES), _OBJECT, limit=MAX_BYTES)
        if {"recipe", "engine"} <= recipe.keys():
            return True
    except (OSError, ValueError):
        pass
    try:
        return not CheckpointFolder(run / "checkpoints").is_empty() or bool(read_metrics(run, lambda _: None))
    except StorageFailed:  # checkpoints that cannot be read; resuming reports them
        return True
    except (OSError, UserError):
        return False

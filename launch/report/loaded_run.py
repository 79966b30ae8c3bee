"""Read what the report shows of a run from its folder. Only the metrics are required."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import fat
from launch.monitor.goodput import Goodput
from launch.monitor.goodput_table import goodput_with_status
from launch.monitor.panels import Timeline
from launch.run.evaluation_record import EvaluationRecord, read_evaluation
from launch.run.files import read_regular
from launch.run.metrics_file import read_run
from launch.run.saved_recipe import CLASSES_NAME, SavedRun, read_saved_run
from launch.run.status import StatusContent, read_content
from shards.errors import UserError, reason_of
from shards.files.lock import STALE_SECONDS
from shards.format.manifest import MAX_MANIFEST_BYTES


@dataclass(frozen=True, kw_only=True)
class LoadedRun:
    path: Path
    timeline: Timeline
    goodput: Goodput
    status: StatusContent | None
    saved: SavedRun | None
    """Recipe, kernels and versions of the last start; None: missing or damaged."""
    classes: tuple[str, ...] | None
    """Name of each class."""
    evaluation: EvaluationRecord | None
    """Details of the last evaluation."""
    notes: tuple[str, ...]
    """What could not be read."""

    @property
    def name(self) -> str:
        return self.timeline.name

    def state(self, now: float | None = None) -> str:
        """Return the status; "died" if the run is called running and has given no sign of life for `STALE_SECONDS`."""
        if self.status is None:
            return "unknown"
        if self.status.status != "running":
            return self.status.status
        alive = max(self.timeline.lines[-1]["time"], self.status.time)
        return "died" if (time.time() if now is None else now) - alive > STALE_SECONDS else "running"


def load_runs(paths: Sequence[Path]) -> list[LoadedRun]:
    """Read run folders. Runs in folders of the same name are named by their paths.

    Raises:
        UserError: a folder is not a run folder, or its metrics cannot be read or are empty.
    """
    folders = [path.resolve().name for path in paths]
    return [
        _load(path, name if folders.count(name) == 1 and name else str(path))
        for path, name in zip(paths, folders, strict=True)
    ]


def _load(path: Path, name: str) -> LoadedRun:
    notes: list[str] = []
    lines = read_run(path, notes.append)
    if not lines:
        raise UserError(f"{path}: its metrics are empty; wait until the run has done its first steps")
    timeline = Timeline(name, lines)
    status = read_content(path)
    saved = classes = evaluation = None
    try:
        saved = read_saved_run(path)
    except UserError as error:
        notes.append(str(error))
    try:
        found = fat.ClassList.loads(read_regular(path / CLASSES_NAME, limit=MAX_MANIFEST_BYTES).decode())
        if found.folders is not None:
            named = zip(found.folders, found.names or found.folders, strict=True)
            classes = tuple(title or folder for folder, title in named)
    except (OSError, ValueError) as error:
        notes.append(f"{path / CLASSES_NAME}: cannot be read ({reason_of(error)}), so classes are shown as numbers")
    try:
        evaluation = read_evaluation(path)
    except UserError as error:
        notes.append(str(error))
    spent = goodput_with_status(lines, status)
    return LoadedRun(
        path=path, timeline=timeline, goodput=spent, status=status, saved=saved, classes=classes,
        evaluation=evaluation, notes=(*notes, *spent.notes),
    )  # fmt: skip

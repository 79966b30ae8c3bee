"""Move files of a run folder that do not belong to its present history to checkpoints-before-N."""

from __future__ import annotations

from pathlib import Path

import fat
from launch.monitor.pictures import HARDEST_NAME
from launch.run.checkpoint import Checkpoint, DamagedCheckpoint, read_checkpoint
from launch.run.checkpoint_folder import CheckpointFolder
from launch.run.evaluation_record import RECORD_NAME, read_evaluation
from launch.run.files import unwritable
from launch.run.metrics_file import METRICS_NAME
from launch.run.origin import ORIGIN_NAME
from launch.run.progress import WEIGHTS_KINDS
from launch.run.weights_files import WeightsFiles, all_weights_files, weights_file
from shards.errors import UserError
from shards.files.durable import sync_folder


def set_all_aside(run: Path, checkpoints: CheckpointFolder, *, metrics: bool = False) -> Path | None:
    """Move checkpoints, metrics, weights, the last evaluation with its images and origin.json to checkpoints-before-N.

    Args:
        metrics: move metrics also if there are neither checkpoints nor weights.

    Returns:
        The folder; None if there was nothing to move.

    Raises:
        UserError: the run folder cannot be written.
    """
    weights = all_weights_files(run)  # without checkpoints, if an earlier start was killed in this function
    lone_metrics = metrics and (run / METRICS_NAME).exists()
    archive = checkpoints.archive(even_if_empty=bool(weights) or lone_metrics)
    try:
        for path in (run / METRICS_NAME, run / RECORD_NAME, run / HARDEST_NAME, *weights, run / ORIGIN_NAME):
            if archive is not None and path.exists():
                path.rename(archive / path.name)
    except OSError as error:
        raise unwritable(run, error) from error
    return archive


def is_later(run: Path, checkpoints: CheckpointFolder, step: int) -> bool:
    """Return whether the run folder has checkpoints, weights or an evaluation of steps after `step`."""
    return any(each > step for each in checkpoints.paths()) or bool(_later_files(run, step))


def set_later_aside(run: Path, checkpoints: CheckpointFolder, *, step: int, archive: str) -> list[str]:
    """Move checkpoints, weights files and the last evaluation of steps after `step` to a folder; return their names.

    If it is interrupted, another call moves the rest. The metrics stay, because their readers recognize lines of
    repeated steps.

    Args:
        archive: name of the folder, in the run folder.

    Raises:
        OSError: the run folder cannot be written.
    """
    (run / archive).mkdir(exist_ok=True)
    steps = checkpoints.set_aside(run / archive, after=step)
    names = [f"step-{each:08d}" for each in steps]
    for path in _later_files(run, step):
        path.rename(run / archive / path.name)
        names.append(path.name)
    for folder in (run / archive, checkpoints.folder, run):  # before the move is recorded as complete
        sync_folder(folder)
    return names


def _later_files(run: Path, step: int) -> list[Path]:
    """Return the weights files and the record of an evaluation that are not known to be of `step` or an earlier step.

    The checkpoint of `step` replaces the last weights, so nothing is lost if their step is unknown.
    """
    found = []
    for path in all_weights_files(run):
        try:
            known = fat.read_info(path).step
        except (OSError, ValueError):
            known = None
        if known is None or known > step:
            found.append(path)
    try:
        record = read_evaluation(run)
        later = record is not None and (record.step is None or record.step > step)
    except UserError:  # damaged
        later = True
    return found + [run / name for name in (RECORD_NAME, HARDEST_NAME) if later and (run / name).exists()]


def restore_best_weights(
    checkpoints: CheckpointFolder, weights: WeightsFiles, run: Path, chosen: Checkpoint
) -> list[str]:
    """Write the best weights files that are missing, from the checkpoints up to the chosen one; return warnings.

    Another call has the same effect.

    Raises:
        CheckpointError: a file cannot be written.
        StorageFailed: a checkpoint cannot be read.
    """
    progress = chosen.progress
    readable, warnings = checkpoints.readable(last=progress.step)
    for kind in WEIGHTS_KINDS:
        if weights_file(run, "best", kind).exists():
            continue
        candidates = [meta for meta in readable if kind in meta.progress.top1]
        restored = None
        while candidates and restored is None:
            best = max(candidates, key=lambda meta: meta.progress.top1[kind])
            try:
                state = read_checkpoint(checkpoints.paths()[best.progress.step], best.progress.step).load()
            except DamagedCheckpoint as error:
                warnings.append(f"{error}; skipped")
                candidates.remove(best)
            else:
                weights.write_best(state, best.progress, kind)
                restored = best.progress
        top1 = restored.top1[kind] if restored else 0.0
        if kind == progress.best_of and top1 < progress.best:
            now = f"has the {top1:.2%} of step {restored.step:,}" if restored else "is written by the next evaluation"
            warnings.append(
                f"the best top-1 accuracy up to step {progress.step:,} is {progress.best:.2%}, but the checkpoint that "
                f"had it has been removed; {weights_file(run, 'best', kind).name} {now}"
            )
    return [f"warning: {warning}" for warning in warnings]

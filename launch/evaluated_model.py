"""Load what is to be evaluated: a weights file, a run or one of its checkpoints."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

import fat
from launch.config.data import DataConfig
from launch.engine.zero_state import weights_of
from launch.run.checkpoint import META, Checkpoint, open_checkpoint
from launch.run.checkpoint_folder import CheckpointFolder
from launch.run.saved_recipe import full_classes
from shards.errors import UserError
from shards.redact import printable

MAX_FAULT = 200  # characters: torch lists all tensors that do not fit


@dataclass(frozen=True)
class EvaluatedModel:
    """A model with what is known of its training."""

    model: fat.FAT
    source: Path
    """Weights file or checkpoint."""
    classes: fat.ClassList | None
    """Of the outputs; None = unknown."""
    size: int
    """Side of the images in pixels."""
    crop_pct: float
    """Fraction of the short side that is looked at."""
    step: int | None
    """Optimiser steps done; None = unknown."""
    notes: tuple[str, ...] = ()
    """Lines for people."""


def load_model(path: Path, *, average: bool) -> EvaluatedModel:
    """Load a model, with the classes, image size and crop that it was trained with.

    Args:
        path: weights file, run folder (its newest checkpoint) or checkpoint folder.
        average: the moving average of the run, instead of its weights.

    Raises:
        UserError: none of these, or not readable.
    """
    if not path.exists():
        raise UserError(f"{path}: no such run folder, checkpoint or weights file")
    try:
        if path.is_file():
            if average:
                raise UserError(f"{path}: --average needs a run folder; or give its weights-ema.safetensors")
            return _of_weights(path)
        return _of_checkpoint(path, average=average)
    except (ValueError, OSError) as error:
        text = str(error)
        raise UserError(text if text.startswith(str(path)) else f"{path}: {text}") from error


def _of_weights(path: Path) -> EvaluatedModel:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = fat.load_model(path)
    info, usual = fat.read_info(path), DataConfig()
    notes = [str(warning.message) for warning in caught]
    if info.size is None:
        notes.append(f"{path} does not say at which image size it was trained; without --size, {usual.size} is used")
    return EvaluatedModel(
        model, path, info.classes, info.size or usual.size, info.crop_pct or usual.crop_pct, info.step, tuple(notes)
    )


def _of_checkpoint(path: Path, *, average: bool) -> EvaluatedModel:
    run, found, notes = _checkpoint(path)
    info = found.info()
    if info.config is None or info.size is None or info.crop_pct is None:
        raise UserError(f"{found.path}: does not say of which model it is; evaluate a weights file of the run")
    state = found.load()
    values = weights_of(state, average=average)
    if average and not values:
        raise UserError(f"{found.path}: trained without a moving average (--ema); leave --average out")
    if "head.bias" not in values:
        raise UserError(f"{found.path}: holds no classifier (head.bias); give another run folder")
    config = dataclasses.replace(info.config, num_classes=len(values["head.bias"]))
    with torch.device("meta"):  # a config may ask for more memory than there are tensors for
        model = fat.FAT(config)
    try:
        model.load_state_dict(values, assign=True)
    except RuntimeError as error:
        fault = str(error).splitlines()[-1].strip()[:MAX_FAULT]
        raise UserError(
            f"{found.path}: its tensors do not fit the model that it names ({fault}); evaluate another checkpoint, or "
            "a weights file of the run"
        ) from error
    classes = None if info.classes is None else full_classes(run, info.classes)
    return EvaluatedModel(model, found.path, classes, info.size, info.crop_pct, found.progress.step, notes)


def _checkpoint(path: Path) -> tuple[Path, Checkpoint, tuple[str, ...]]:
    """Return (run folder, checkpoint, lines for people)."""
    if (path / META).exists():
        return path.absolute().parents[1], open_checkpoint(path), ()
    folder = CheckpointFolder(path / "checkpoints")
    found, complaints = folder.newest()
    for complaint in complaints:
        print(f"warning: {printable(complaint)}", file=sys.stderr)
    if found is None:
        raise UserError(
            f"{path}: no whole checkpoint in it; give a run folder (--out of the training), one of its checkpoints or "
            "a weights file"
        )
    best = folder.best()
    if best is None or best == found.path:
        return path, found, ()
    return path, found, (f"{found.path} is the newest checkpoint; the best is {best}",)

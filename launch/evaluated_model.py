"""Load the model of a weights file, a run or a checkpoint for evaluation."""

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
from launch.run.saved_recipe import restore_class_names
from shards.errors import UserError
from shards.redact import printable

MAX_ERROR = 200  # maximum characters of PyTorch's message, which lists all tensors that do not match


@dataclass(frozen=True)
class EvaluatedModel:
    """Model to evaluate, and the settings of its training that the evaluation needs."""

    model: fat.FAT
    source: Path
    """Path of the weights file or checkpoint."""
    classes: fat.ClassList | None
    """Class of each output of the model; None: unknown."""
    size: int
    """Height and width of the input images in pixels."""
    crop_pct: float
    """Fraction of the short side that the center crop keeps."""
    step: int | None
    """Number of optimizer steps trained; None: unknown."""
    notes: tuple[str, ...] = ()
    """Messages for the user."""


def load_model(path: Path, *, average: bool) -> EvaluatedModel:
    """Load a model, with the classes, image size and crop that it was trained with.

    Args:
        path: weights file, run folder (its newest checkpoint) or checkpoint folder.
        average: load the EMA of the run instead of its weights.

    Raises:
        UserError: `path` is not a weights file, a run folder or a checkpoint folder, or cannot be read.
    """
    if not path.exists():
        raise UserError(f"{path}: no such run folder, checkpoint or weights file")
    try:
        if path.is_file():
            if average:
                raise UserError(
                    f"{path}: --average requires a run folder; evaluate the run folder, or its weights-ema.safetensors"
                )
            return _load_weights_file(path)
        return _load_checkpoint(path, average=average)
    except (ValueError, OSError) as error:
        text = str(error)
        raise UserError(text if text.startswith(str(path)) else f"{path}: {text}") from error


def _load_weights_file(path: Path) -> EvaluatedModel:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = fat.load_model(path)
    info, defaults = fat.read_info(path), DataConfig()
    size, crop_pct = info.size or defaults.size, info.crop_pct or defaults.crop_pct
    notes = [str(warning.message) for warning in caught]
    if info.size is None:
        notes.append(f"{path} does not record the image size of its training; {size} is used unless --size is set")
    return EvaluatedModel(model, path, info.classes, size, crop_pct, info.step, tuple(notes))


def _load_checkpoint(path: Path, *, average: bool) -> EvaluatedModel:
    run, found, notes = _find_checkpoint(path)
    info = found.info()
    if info.config is None or info.size is None or info.crop_pct is None:
        raise UserError(f"{found.path}: does not record the model's dimensions; evaluate a weights file of the run")
    state = found.load()
    values = weights_of(state, average=average)
    if average and not values:
        raise UserError(f"{found.path}: trained without a moving average (--ema); omit --average")
    if "head.bias" not in values:
        raise UserError(f"{found.path}: contains no classifier (head.bias); use another run folder")
    config = dataclasses.replace(info.config, num_classes=len(values["head.bias"]))
    with torch.device("meta"):  # allocates nothing: a damaged config could request far more memory than the tensors
        model = fat.FAT(config)
    try:
        model.load_state_dict(values, assign=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()[:MAX_ERROR]
        raise UserError(
            f"{found.path}: its tensors do not match the model dimensions in its header ({reason}); evaluate another "
            "checkpoint, or a weights file of the run"
        ) from error
    classes = None if info.classes is None else restore_class_names(run, info.classes)
    return EvaluatedModel(model, found.path, classes, info.size, info.crop_pct, found.progress.step, notes)


def _find_checkpoint(path: Path) -> tuple[Path, Checkpoint, tuple[str, ...]]:
    """Return the run folder, the checkpoint to evaluate and messages for the user."""
    if (path / META).exists():
        return path.absolute().parents[1], open_checkpoint(path), ()
    folder = CheckpointFolder(path / "checkpoints")
    found, skipped = folder.newest()
    for message in skipped:
        print(f"warning: {printable(message)}", file=sys.stderr)
    if found is None:
        raise UserError(
            f"{path}: contains no complete checkpoint; use a run folder (--out of the training), one of its "
            "checkpoints or a weights file"
        )
    best = folder.best()
    if best is None or best == found.path:
        return path, found, ()
    return path, found, (f"{found.path} is the newest checkpoint; the best is {best}",)

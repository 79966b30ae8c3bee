"""Find the weights file of a run, and create the model of a weights file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from torch import nn

import fat
from launch.models.specification import ModelSpec
from launch.models.weights import load_model_file
from launch.run.saved_recipe import restore_class_names
from launch.run.weights_files import best_weights_file, weights_file
from shards.errors import UserError, about_file, storage_error


def find_weights(path: Path, *, ema: bool = False) -> Path:
    """Return the weights of a run folder with the best accuracy, else its last ones; `path` itself if it is a file.

    Args:
        ema: only consider the moving average of a run's weights.

    Raises:
        UserError: `path` does not exist, or is a folder without weights.
    """
    try:
        if path.is_file():
            if ema:
                raise UserError(f"{path}: --ema requires a run folder; specify one, or the file of its moving average")
            return path
        if not path.is_dir():
            raise UserError(f"{path}: no such run folder or weights file")
        if not ema:
            return best_weights_file(path)
        best, last = (weights_file(path, which, "average") for which in ("best", "last"))
        if best.is_file() or last.is_file():
            return best if best.is_file() else last
    except OSError as error:
        raise storage_error(path, error) from error
    raise UserError(f"{path}: contains no {last.name}; omit --ema, unless the run was trained with a moving average")


def load_weights_file(
    path: Path, given: ModelSpec | None = None, *, request: str = "add --model {}"
) -> tuple[nn.Module, fat.WeightsInfo, tuple[str, ...]]:
    """Create the model of a weights file, in eval mode.

    Args:
        given: model that the user named (`launch.models.weights.load_model_file`).
        request: see `launch.models.specification.spec_in_file`.

    Returns:
        The model, which maps normalized images [B, 3, H, W] to logits; the metadata, with class names from the run
        folder that contains the file if the file has only their digest; and messages about the file, one line each.

    Raises:
        UserError: the file is invalid, or its model cannot be created.
    """
    try:
        model, info, notes = load_model_file(path, given, request=request)
    except (UserError, ValueError, OSError) as error:
        raise UserError(about_file(path, error)) from error
    if info.classes is not None:
        info = dataclasses.replace(info, classes=restore_class_names(path.parent, info.classes))
    if info.size is None:
        notes.append(f"{path}: does not record the image size of its training")
    return model, info, tuple(notes)

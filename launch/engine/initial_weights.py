"""Load the weights that a training starts from (`--weights`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

import fat
from fat.weights.classifier import is_new_classifier
from fat.weights.entries import listed
from launch.config.recipe import Recipe
from launch.models.classifier import classifier_name
from launch.models.weights import load_weights
from shards.errors import UserError, about_file


def load_initial_weights(
    model: nn.Module, recipe: Recipe, classes: fat.ClassList, *, file_of_run: Callable[[Path], Path]
) -> list[str]:
    """Load the weights of `--weights`, if it is set; return messages: what was loaded, and what was not.

    Args:
        classes: classes of the data set.
        file_of_run: returns the weights file to load of a run folder.

    Raises:
        UserError: the file cannot be read, or its weights do not fit the model.
    """
    path = recipe.model.weights
    if path is None:
        unloaded = "warning: --freeze-backbone without --weights: the backbone keeps its random weights"
        return [unloaded] if recipe.model.freeze_backbone else []
    try:
        if path.is_dir():
            path = file_of_run(path)
        info, notes = fat.read_info(path), load_weights(model, path, classes=classes)
    except (UserError, ValueError, OSError) as error:
        raise UserError(f"--weights {about_file(path, error)}") from error
    # All tensors are loaded, except those of a classifier that is initialized anew.
    names, head = list(model.state_dict()), f"{classifier_name(model) or 'head'}."
    omitted = [name for name in names if name.startswith(head)] if any(map(is_new_classifier, notes)) else []
    facts = [
        *([] if info.step is None else [f"step {info.step:,}"]),
        *([] if info.top1 is None else [f"top-1 {info.top1:.2%}"]),
        *(["moving average (EMA)"] if info.ema else []),
    ]
    return [
        f"loaded {len(names) - len(omitted):,} of {len(names):,} tensors from {path}"
        + (f" ({', '.join(facts)})" if facts else "")
        + (f"; not loaded: {listed(omitted)}" if omitted else ""),
        *(f"{path}: {note}" for note in notes),
    ]

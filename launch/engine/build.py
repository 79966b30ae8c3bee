"""Build the model of a recipe and load its initial weights."""

from __future__ import annotations

import torch
from torch import nn

import fat
from fat.config import FATConfig
from launch.config.recipe import Recipe
from launch.models.create import check_model, create_model, fat_config
from launch.models.weights import load_weights
from pipeline.rng import Stream, seed64
from shards.errors import UserError


def build_model(recipe: Recipe, classes: int) -> nn.Module:
    """Return the model, initialized from the run's seed, and checked if it is not a FAT.

    Raises:
        UserError: the model cannot be created, or not be trained with these images and classes.
    """
    options = recipe.model
    torch.manual_seed(seed64(Stream.INIT, recipe.run.seed))
    model = create_model(options.spec, num_classes=classes, drop_path=options.drop_path)
    if not options.spec.is_fat:
        check_model(model, options.spec, size=recipe.data.size, num_classes=classes)
    return model


def config_of(recipe: Recipe, classes: int) -> FATConfig | None:
    """Return the dimensions of the recipe's model; None if it is not a FAT."""
    spec = recipe.model.spec
    return fat_config(spec, num_classes=classes, drop_path=recipe.model.drop_path) if spec.is_fat else None


def load_initial_weights(model: nn.Module, recipe: Recipe, classes: fat.ClassList) -> list[str]:
    """Load the weights of `--weights`, if it is set; return messages, such as what was done with the classifier.

    Args:
        classes: classes of the data set.

    Raises:
        UserError: the file cannot be read, or its weights do not fit the model.
    """
    path = recipe.model.weights
    if path is None:
        return []
    if path.is_dir():
        raise UserError(
            f"--weights {path}: is a folder; use a weights file, such as {path / 'weights-last.safetensors'}"
        )
    try:
        return [f"{path}: {note}" for note in load_weights(model, path, classes=classes)]
    except (ValueError, OSError) as error:
        raise UserError(f"--weights: {error}") from error

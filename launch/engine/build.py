"""Build the model of a recipe and load its initial weights."""

from __future__ import annotations

import dataclasses

import torch

import fat
from fat.config import VARIANTS, FATConfig
from launch.config.recipe import Recipe
from pipeline.rng import Stream, seed64
from shards.errors import UserError


def build_model(recipe: Recipe, classes: int) -> fat.FAT:
    """Return the model, initialized from the run's seed."""
    torch.manual_seed(seed64(Stream.INIT, recipe.run.seed))
    return fat.FAT(config_of(recipe, classes))


def config_of(recipe: Recipe, classes: int) -> FATConfig:
    """Return the dimensions of the recipe's model."""
    config = dataclasses.replace(VARIANTS[f"fat_{recipe.model.variant}"], num_classes=classes)
    drop_path = recipe.model.drop_path
    return config if drop_path is None else dataclasses.replace(config, drop_path=drop_path)


def load_initial_weights(model: fat.FAT, recipe: Recipe, classes: fat.ClassList) -> list[str]:
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
        return [f"{path}: {note}" for note in fat.load_weights(model, path, classes=classes)]
    except (ValueError, OSError) as error:
        raise UserError(f"--weights: {error}") from error

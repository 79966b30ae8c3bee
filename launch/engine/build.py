"""The recipe's model."""

from __future__ import annotations

import dataclasses

import torch

import fat
from fat.config import VARIANTS, FATConfig
from launch.config.recipe import Recipe
from pipeline.rng import Stream, seed64
from shards.errors import UserError


def build_model(recipe: Recipe, classes: int) -> fat.FAT:
    """The variant, initialised from the run's seed."""
    torch.manual_seed(seed64(Stream.INIT, recipe.run.seed))
    return fat.FAT(config_of(recipe, classes))


def config_of(recipe: Recipe, classes: int) -> FATConfig:
    """Dimensions of the recipe's model."""
    config = dataclasses.replace(VARIANTS[f"fat_{recipe.model.variant}"], num_classes=classes)
    drop_path = recipe.model.drop_path
    return config if drop_path is None else dataclasses.replace(config, drop_path=drop_path)


def load_initial_weights(model: fat.FAT, recipe: Recipe, classes: fat.ClassList) -> list[str]:
    """Fill the model from `--weights`, if given; returns lines for people, about the classifier too.

    Args:
        classes: of the data set.

    Raises:
        UserError: weights that do not fit.
    """
    path = recipe.model.weights
    if path is None:
        return []
    if path.is_dir():
        raise UserError(f"--weights {path}: a folder; give a weights file, such as {path / 'weights.safetensors'}")
    try:
        return [f"{path}: {note}" for note in fat.load_weights(model, path, classes=classes)]
    except (ValueError, OSError) as error:
        raise UserError(f"--weights: {error}") from error

"""Build the model of a recipe."""

from __future__ import annotations

import torch
from torch import nn

from fat.config import FATConfig
from launch.config.recipe import Recipe
from launch.models.create import check_model, create_model, fat_config
from pipeline.rng import Stream, seed64


def build_model(recipe: Recipe, classes: int) -> nn.Module:
    """Return the model, initialized from the run's seed, and checked if it is not a FAT.

    Raises:
        UserError: the model cannot be created, or not be trained with these images and classes.
    """
    options = recipe.model
    torch.manual_seed(seed64(Stream.INIT, recipe.run.seed))
    model = create_model(options.spec, num_classes=classes, drop_path=options.drop_path)
    if not options.spec.is_fat:
        for size in recipe.data.model_sizes:
            check_model(model, options.spec, size=size, num_classes=classes)
    return model


def config_of(recipe: Recipe, classes: int) -> FATConfig | None:
    """Return the dimensions of the recipe's model; None if it is not a FAT."""
    spec = recipe.model.spec
    return fat_config(spec, num_classes=classes, drop_path=recipe.model.drop_path) if spec.is_fat else None

"""The recipe's model."""

from __future__ import annotations

import torch

import fat
from launch.recipe import Recipe
from pipeline.rng import Stream, seed64
from shards.errors import UserError


def build_model(recipe: Recipe, classes: int) -> fat.FAT:
    """The variant, initialised from the run's seed or from `--weights`.

    Raises:
        UserError: weights that do not fit.
    """
    torch.manual_seed(seed64(Stream.INIT, recipe.run.seed))
    try:
        return fat.create_model(
            f"fat_{recipe.model.variant}",
            num_classes=classes,
            drop_path=recipe.model.drop_path,
            weights=recipe.model.weights,
            replace_head=True,
        )
    except (ValueError, OSError) as error:
        raise UserError(f"--weights: {error}") from error

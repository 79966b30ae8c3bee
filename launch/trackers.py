"""Views of the metrics for TensorBoard and Weights & Biases, through accelerate's trackers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from launch.recipe import Recipe, RecipeError


def open_trackers(recipe: Recipe, folder: Path) -> list[Any]:
    """Start the trackers that the recipe names, each with `log(values, step)` and `finish()`. Rank 0 alone calls it.

    Raises:
        RecipeError: the library is not installed.
    """
    if not recipe.run.tracker:
        return []
    for name in recipe.run.tracker:
        if importlib.util.find_spec(name) is None:
            raise RecipeError(f"--tracker {name}: {name} is not installed; pip install 'fat-pipeline[track]'")
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    trackers = []
    for name in recipe.run.tracker:
        kind = LOGGER_TYPE_TO_CLASS[name]
        location = {"logging_dir": str(folder)} if kind.requires_logging_directory else {}
        tracker = kind(folder.name, **location)
        if hasattr(tracker, "start"):
            tracker.start()
        tracker.store_init_configuration(_flat(recipe.to_dict()))
        trackers.append(tracker)
    return trackers


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, int | float | str | bool]:
    """Nested values as `section.name`, in the types that every tracker takes."""
    flat: dict[str, int | float | str | bool] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat

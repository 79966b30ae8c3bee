"""Views of the metrics for TensorBoard and Weights & Biases, through accelerate's trackers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.recipe import Recipe, RecipeError
from shards.errors import first_line


class Trackers:
    """The trackers that the recipe names. Rank 0 alone makes them.

    One that fails (no network, a full disk) never ends the run: `messages` reports it once. One that has started is
    tried again at the next line; one that cannot start is left out.

    Raises:
        RecipeError: the library is not installed.
    """

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        for name in recipe.run.tracker:
            if importlib.util.find_spec(name) is None:
                raise RecipeError(f"--tracker {name}: {name} is not installed; pip install 'fat-pipeline[track]'")
        self._trackers: dict[str, Any] = {}
        self._failing: set[str] = set()
        self._messages: list[str] = []
        for name in recipe.run.tracker:
            self._try(name, lambda name=name: self._start(name, recipe, folder))  # type: ignore[misc]

    def log(self, values: dict[str, int | float], *, step: int) -> None:
        """Log numbers by name."""
        for name, tracker in self._trackers.items():
            self._try(name, lambda tracker=tracker: tracker.log(values, step=step))  # type: ignore[misc]

    def finish(self) -> None:
        """Write what they hold, and close them."""
        for name, tracker in self._trackers.items():
            self._try(name, tracker.finish)

    def messages(self) -> list[str]:
        """Return warnings since the last call."""
        told, self._messages = self._messages, []
        return told

    def _start(self, name: str, recipe: Recipe, folder: Path) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        kind = LOGGER_TYPE_TO_CLASS[name]
        location = {"logging_dir": str(folder)} if kind.requires_logging_directory else {}
        tracker = kind(folder.name, **location)
        if hasattr(tracker, "start"):
            tracker.start()
        tracker.store_init_configuration(_flat(recipe.to_dict()))
        self._trackers[name] = tracker

    def _try(self, name: str, action: Callable[[], Any]) -> None:
        try:
            action()
            self._failing.discard(name)
        except Exception as error:  # a tracker may raise anything, and must not end the run
            if name not in self._failing:
                self._failing.add(name)
                fact = first_line(error) or type(error).__name__
                self._messages.append(f"warning: --tracker {name} failed ({fact}); the run continues without it")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, int | float | str | bool]:
    """Nested values as `section.name`, in the types that every tracker takes."""
    flat: dict[str, int | float | str | bool] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat

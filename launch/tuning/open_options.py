"""The options about speed that a recipe may leave open (None): where they stand in it, and their values."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, cast

from launch.config.recipe import Recipe
from launch.engine.execution import switch
from launch.tuning.trials import Value

# Where in a recipe the options stand.
PLACES: dict[str, tuple[str, ...]] = {
    "memory_format": ("compile", "memory_format"),
    "kernels": ("compile", "kernels"),
    "compile": ("compile", "compile"),
    "optimizer_impl": ("compile", "optimizer_impl"),
    "read_threads": ("data", "loader", "read_threads"),
    "read_ahead": ("data", "loader", "read_ahead"),
    "decode_threads": ("data", "loader", "decode_threads"),
    "decode_ahead": ("data", "loader", "decode_ahead"),
    "hw_decoder_load": ("data", "loader", "dali", "hw_decoder_load"),
    "preallocate_width": ("data", "loader", "dali", "preallocate_width"),
    "preallocate_height": ("data", "loader", "dali", "preallocate_height"),
}


def with_values(recipe: Recipe, values: Mapping[str, Value | None]) -> Recipe:
    """A recipe with these options; None leaves one as it is."""
    for name, value in values.items():
        recipe = recipe if value is None else _put(recipe, PLACES[name], value)
    return recipe


def given(recipe: Recipe) -> dict[str, Value]:
    """The options that are not open, with their values."""
    found = {name: functools.reduce(getattr, place, cast(Any, recipe)) for name, place in PLACES.items()}
    found["kernels"] = found["kernels"] or switch()
    return {name: value for name, value in found.items() if value is not None}


def option_name(name: str) -> str:
    """As on the command line."""
    return name.replace("_", "-")


def _put(section: Any, place: tuple[str, ...], value: Value) -> Any:
    name, *rest = place
    inner = _put(getattr(section, name), tuple(rest), value) if rest else value
    return dataclasses.replace(section, **{name: inner})

"""Parse the command line and TOML files into a recipe."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tomllib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from pydantic import TypeAdapter, ValidationError

from launch.config.errors import RecipeError
from launch.config.model import Variant
from launch.config.recipe import VARIANTS, Recipe
from shards.errors import UserError
from shards.schema import first_fact

MAX_BYTES = 1 << 20  # of a recipe file


RecipeFiles = Annotated[
    tyro.conf.UseAppendAction[tuple[Path, ...]],
    tyro.conf.arg(
        help="TOML file of options, in the sections [model], [data], [optim] and so on, as grouped below. May be given "
        "several times: later files override earlier ones, and the command line overrides all.",
        help_behavior_hint="(repeatable)",
    ),
]


@dataclass(frozen=True, kw_only=True)
class _Start:
    """Read before the rest: they choose the defaults that the other options override."""

    variant: Variant = "b0"
    recipe: RecipeFiles = ()


def parse(
    args: Sequence[str] | None = None, *, defaults: Mapping[str, Any] | None = None, prog: str | None = None
) -> Recipe:
    """Return the recipe of a command line: the variant's, then every `--recipe FILE` in order, then single options.

    Args:
        defaults: sections that replace the variant's defaults, as a recipe file has them.
        prog: name of the command in messages; None = that of the process.

    Raises:
        RecipeError: an unreadable recipe file or contradictory options.
        SystemExit: unknown options (status 2), --help (status 0).
    """
    args = list(sys.argv[1:] if args is None else args)
    flat = (tyro.conf.OmitArgPrefixes,)
    start, _ = tyro.cli(
        _Start, args=[a for a in args if a not in ("-h", "--help")], return_unknown_args=True, config=flat
    )
    default = _merge(VARIANTS[start.variant](), dict(defaults or {}), "defaults")
    for path in start.recipe:
        default = with_file(default, path)
    full = dataclasses.make_dataclass(
        "TrainCommand",
        [
            ("recipe", RecipeFiles, ()),
            ("all", Annotated[Recipe, tyro.conf.arg(name="")], default),
        ],
        frozen=True,
    )
    command: Any = tyro.cli(
        full, args=args, prog=prog, description="Train a FAT backbone from a shard set.", config=flat
    )
    recipe: Recipe = command.all
    return dataclasses.replace(recipe, data=recipe.data.with_environment(os.environ))


def with_file(recipe: Recipe, path: Path) -> Recipe:
    """`recipe` with the values of a TOML file put in.

    Raises:
        RecipeError: unreadable file, unknown section or field, or a value of the wrong type.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise RecipeError(f"{path}: more than {MAX_BYTES >> 20} MiB; name a TOML file of options")
        values = tomllib.loads(content.decode())
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe file") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, no TOML, a number without end
        raise RecipeError(f"{path}: not a readable TOML file ({error})") from error
    try:
        return typing.cast(Recipe, _merge(recipe, values, str(path)))
    except UserError as error:
        if str(error).startswith(str(path)):
            raise
        raise RecipeError(f"{path}: {error}") from error  # of a section's own checks, which do not know the file


def _merge(base: Any, values: dict[str, Any], where: str) -> Any:
    types = typing.get_type_hints(type(base), include_extras=True)
    changes = {}
    for name, value in values.items():
        if name not in types:
            raise RecipeError(f"{where}: unknown entry '{name}'; there are: {', '.join(sorted(types))}")
        current = getattr(base, name)
        if dataclasses.is_dataclass(current):
            if not isinstance(value, dict):
                raise RecipeError(f"{where}: '{name}' is a section of its own: write [{name}] and its fields below")
            changes[name] = _merge(current, value, f"{where} [{name}]")
        else:
            changes[name] = _convert(value, types[name], f"{where}: {name}")
    return dataclasses.replace(base, **changes)


def _convert(value: Any, wanted: Any, where: str) -> Any:
    """A TOML value as the field's type, within the field's range."""
    try:
        return TypeAdapter(wanted).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        raise RecipeError(f"{where}: {first_fact(error)}") from None
    except (TypeError, ValueError):  # dates
        raise RecipeError(f"{where}: {value!r} is not a value of an option") from None

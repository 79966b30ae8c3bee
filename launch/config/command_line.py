"""Parse the command line and TOML files into a recipe."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from pydantic import TypeAdapter, ValidationError

from launch.config.errors import RecipeError
from launch.config.recipe import Recipe
from shards.command import check_options, option_names, suggestion
from shards.errors import UserError, reason_of
from shards.files.regular import NotRegular, read_bounded
from shards.schema import first_error

RECIPES = Path(__file__).parents[1] / "recipes"
MAX_BYTES = 1 << 20  # maximum size of a recipe file
_SCHEMA = TypeAdapter(Recipe)

RecipeFiles = Annotated[
    tyro.conf.UseAppendAction[tuple[Path, ...]],
    tyro.conf.arg(
        help="TOML file of options, in sections named like the groups below: [model], [data], [optim] and so on; or "
        "the name of a recipe of this project ('pipeline recipes' lists them); or the recipe.json of a run, whose "
        "options except --out and --resume are used. Later files override earlier ones. Options on the command line "
        "override all files.",
        help_behavior_hint="(repeatable)",
    ),
]


@dataclass(frozen=True, kw_only=True)
class _Files:
    """The recipe files. They are parsed first, because they set the defaults of all other options."""

    recipe: RecipeFiles = ()


@dataclass(frozen=True, kw_only=True)
class _TrainCommand(_Files):
    """All options of the training command."""

    all: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=Recipe)


def parse(
    args: Sequence[str] | None = None,
    *,
    defaults: Mapping[str, Any] | None = None,
    prog: str | None = None,
    elsewhere: Mapping[str, Collection[str]] | None = None,
) -> Recipe:
    """Return the recipe of a command line: the defaults, then every `--recipe FILE` in order, then single options.

    Args:
        defaults: values that replace the defaults, by section as in a recipe file.
        prog: name of the command in messages. None: launch/train.py.
        elsewhere: see `check_options`.

    Raises:
        UserError: an option is unknown.
        RecipeError: a recipe file is invalid, or options contradict one another.
        SystemExit: a value has the wrong type (status 2), --help (status 0).
    """
    args = list(sys.argv[1:] if args is None else args)
    prog = prog or "launch/train.py"
    check_options(args, option_names(_TrainCommand), command=prog, elsewhere=elsewhere)
    flat = (tyro.conf.OmitArgPrefixes,)
    files, _ = tyro.cli(
        _Files, args=[a for a in args if a not in ("-h", "--help")], return_unknown_args=True, config=flat
    )
    recipe = _with_values(Recipe(), defaults or {})
    for path in files.recipe:
        recipe = apply_file(recipe, find_recipe(path))
    recipe = tyro.cli(
        _TrainCommand,
        args=args,
        default=_TrainCommand(all=recipe),
        prog=prog,
        description="Train a FAT backbone from a shard set.",
        config=flat,
    ).all
    return dataclasses.replace(recipe, data=recipe.data.with_environment(os.environ))


def parse_for_set(
    dataset: str, training: Sequence[str], *, own: Collection[str], data: Mapping[str, Any] | None = None
) -> Recipe:
    """Return the recipe of the training options after `--` of a command that has the shard set as an argument.

    Args:
        training: options of launch/train.py.
        own: options of the command, which are not valid after `--`.
        data: values of [data] that replace the defaults.

    Raises:
        UserError: see `parse`; or `training` selects another set with --data.
    """
    elsewhere = {"an option of the command, not of training; write it before --": own}
    arguments = ["--data", dataset, *training]
    recipe = parse(arguments, defaults={"data": data or {}}, prog="-- [training options]", elsewhere=elsewhere)
    if recipe.data.data != dataset:
        raise UserError(f"--data {recipe.data.data}: differs from the set {dataset} of the command; omit --data")
    return recipe


def find_recipe(path: Path) -> Path:
    """Return the file of a recipe: `path` itself, or the shipped recipe of this name.

    Raises:
        RecipeError: there is neither.
    """
    if path.exists() and not path.is_dir():
        return path
    shipped = shipped_recipes()
    if str(path) in shipped:  # also if there is a folder of this name, such as the images of `digits`
        return shipped[str(path)]
    if path.is_dir():
        raise RecipeError(f"{path}: is a folder; specify a file in it, such as a run's recipe.json")
    near = suggestion(str(path), shipped) if len(path.parts) == 1 else ""
    raise RecipeError(f"{path}: no such recipe file{near} (expected a file, or one of the names {', '.join(shipped)})")


def shipped_recipes() -> dict[str, Path]:
    """Return the files of the recipes of this project by name, sorted."""
    return {file.stem: file for file in sorted(RECIPES.glob("*.toml"))}


def apply_file(recipe: Recipe, path: Path) -> Recipe:
    """Return `recipe` with the values of a TOML file, or of a run's recipe.json, applied.

    Raises:
        RecipeError: the file cannot be read, a section or field is unknown, or a value has the wrong type.
    """
    try:
        content = read_bounded(path, MAX_BYTES)
        values = _of_run(json.loads(content)) if path.suffix == ".json" else tomllib.loads(content.decode())
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe file") from None
    except NotRegular as error:  # reading a FIFO would wait for a writer
        raise RecipeError(f"{path}: is {error.kind}; use a file of options") from error
    except UserError as error:
        raise RecipeError(f"{error}; use a TOML file of options") from error
    except (OSError, ValueError, RecursionError) as error:  # ValueError: the file is not UTF-8 or not TOML
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise RecipeError(f"{path}: not a readable {kind} file ({reason_of(error)})") from error
    try:
        return _with_values(recipe, values)
    except UserError as error:
        raise RecipeError(f"{path}: {error}; --help lists the options of each section") from error


def _of_run(saved: Any) -> dict[str, Any]:
    """Return the options in the content of a recipe.json, without --out and --resume: a new run needs its own.

    Raises:
        ValueError: the content is not that of a recipe.json.
    """
    if not isinstance(saved, dict) or not isinstance(recipe := saved.get("recipe"), dict):
        raise ValueError("expected the recipe.json of a run folder")
    return recipe | {
        section: {name: value for name, value in values.items() if name != own}
        for section, own in (("run", "out"), ("checkpoint", "resume"))
        if isinstance(values := recipe.get(section), dict)
    }


def _with_values(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """Return `recipe` with values replaced, checked against the types and ranges of the fields.

    Args:
        values: nested by section, as in a TOML file.

    Raises:
        UserError: a value is invalid; the message names the section and the field.
    """
    try:
        # TOML values can be dates, which JSON does not support: `str` converts them.
        merged = json.dumps(_merged(_SCHEMA.dump_python(recipe, mode="json"), values), default=str)
        return _SCHEMA.validate_json(merged, strict=True, extra="forbid")
    except ValidationError as error:
        raise RecipeError(first_error(error)) from None


def _merged(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in values.items():
        nested = isinstance(value, Mapping) and isinstance(base.get(name), Mapping)
        merged[name] = _merged(base[name], value) if nested else value
    return merged

"""Read and validate RUN/recipe.json, which may have been edited, copied or damaged."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Interval
from pydantic import TypeAdapter

import fat
from launch.config.recipe import Recipe
from launch.run.files import read_regular
from launch.tuning.trials import Value
from shards.errors import UserError
from shards.format.manifest import MAX_MANIFEST_BYTES
from shards.schema import parse_json

RECIPE_NAME = "recipe.json"
CLASSES_NAME = "classes.json"
"""Classes of the outputs, as `fat.ClassList.dumps` writes them; complete, however many there are."""
MAX_BYTES = 1 << 20  # one of a large run has 6 kB
Processes = Annotated[int, Interval(ge=1, le=1_000_000)]


@dataclass(frozen=True, kw_only=True)
class SavedEngine:
    """Engine settings of the last start."""

    zero: Literal[0, 1, 2, 3]
    precision: Literal["bf16", "fp32"]
    world: Processes


@dataclass(frozen=True, kw_only=True)
class SavedChoices:
    """Performance options with which the run began, and the machine where it began."""

    device: str
    cores: Processes
    ranks: Processes
    values: dict[str, Value | None]


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """Content of recipe.json."""

    recipe: Recipe
    engine: SavedEngine
    choices: SavedChoices
    kernels: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str | None] = field(default_factory=dict)
    git: str | None = None


_SCHEMA = TypeAdapter(SavedRun)
_RAW = TypeAdapter(dict[str, Any])


def read_saved_run(run: Path) -> SavedRun:
    """Read RUN/recipe.json.

    Raises:
        UserError: there is none, or it is not what a run of this version writes; names the field.
    """
    path = run / RECIPE_NAME
    try:
        return parse_json(read_regular(path, limit=MAX_BYTES), _SCHEMA, limit=MAX_BYTES)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a run folder") from error
    except ValueError as error:
        raise UserError(f"{path}: not the recipe of a run ({error}); restore it, or give a weights file") from error
    except UserError as error:  # options that contradict one another
        raise UserError(f"{path}: not the recipe of a run ({error}); restore it") from error


def full_classes(run: Path, known: fat.ClassList) -> fat.ClassList:
    """Return the names of classes of which a header holds the digest alone, if RUN/classes.json has them.

    Raises:
        UserError: that file cannot be read, or is damaged.
    """
    path = run / CLASSES_NAME
    if known.folders is not None:
        return known
    try:
        found = fat.ClassList.loads(read_regular(path, limit=MAX_MANIFEST_BYTES).decode())
    except FileNotFoundError:
        return known
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); correct that, or remove it") from error
    except ValueError as error:
        raise UserError(f"{path}: not the classes of a run ({error}); restore it, or remove it") from error
    return found if found.digest == known.digest else known


def read_raw(path: Path) -> dict[str, Any]:
    """Read a recipe.json as plain values, which are not validated.

    Raises:
        OSError: it cannot be read.
        ValueError: it is too large, or no JSON object.
    """
    return parse_json(read_regular(path, limit=MAX_BYTES), _RAW, limit=MAX_BYTES)

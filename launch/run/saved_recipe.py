"""Read and validate RUN/recipe.json, which users may have edited or copied, and which may be damaged."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from annotated_types import Interval
from pydantic import TypeAdapter

import fat
from launch.config.recipe import Recipe
from launch.machine.world import World, broadcast_from_rank0
from launch.run.files import read_regular
from launch.run.origin import Origins
from shards.errors import UserError
from shards.format.manifest import MAX_MANIFEST_BYTES
from shards.schema import parse_json

RECIPE_NAME = "recipe.json"
CLASSES_NAME = "classes.json"
"""File of the classes of the model's outputs, including their names (`fat.ClassList.dumps`)."""
MAX_BYTES = 1 << 20  # maximum size of a file; a typical recipe.json has 6 kB
Processes = Annotated[int, Interval(ge=1, le=1_000_000)]


@dataclass(frozen=True, kw_only=True)
class SavedEngine:
    """Engine settings of the last start, and the machine of rank 0."""

    zero: Literal[0, 1, 2, 3]
    precision: Literal["bf16", "fp32"]
    world: Processes
    device: str
    cores: Processes


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """Content of recipe.json."""

    recipe: Recipe
    engine: SavedEngine
    kernels: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str | None] = field(default_factory=dict)
    git: str | None = None
    origins: Origins = field(default_factory=Origins)
    """Checkpoints that were chosen with `--resume`."""


_SCHEMA = TypeAdapter(SavedRun)
T = TypeVar("T")


def read_saved_run(run: Path) -> SavedRun:
    """Read RUN/recipe.json.

    Raises:
        UserError: the file is missing or invalid; the message names the field.
    """
    path = run / RECIPE_NAME
    try:
        return parse_json(read_regular(path, limit=MAX_BYTES), _SCHEMA, limit=MAX_BYTES)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); use a run folder") from error
    except ValueError as error:
        raise UserError(f"{path}: invalid recipe ({error}); restore the file, or use a weights file") from error
    except UserError as error:  # raised if the options contradict one another
        raise UserError(f"{path}: invalid recipe ({error}); restore the file") from error


def restore_class_names(run: Path, known: fat.ClassList) -> fat.ClassList:
    """Return the classes with names from RUN/classes.json, if `known` has only a digest and the file has its names.

    Raises:
        UserError: the file cannot be read, or is damaged.
    """
    path = run / CLASSES_NAME
    if known.folders is not None:
        return known
    try:
        found = fat.ClassList.loads(read_regular(path, limit=MAX_MANIFEST_BYTES).decode())
    except FileNotFoundError:
        return known
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); correct this, or remove the file") from error
    except ValueError as error:
        raise UserError(f"{path}: invalid list of classes ({error}); restore or remove the file") from error
    return found if found.digest == known.digest else known


def read_previous_start(run: Path, world: World) -> tuple[SavedRun | None, list[str]]:
    """Read RUN/recipe.json of a run that is resumed, on rank 0 for all ranks; return it and messages. Collective."""

    def read() -> tuple[SavedRun | None, list[str]]:
        try:
            return read_saved_run(run), []
        except UserError as error:
            return None, [f"warning: {error}; options that are not set get their defaults"]

    return broadcast_from_rank0(read, world)


def inherit_options(recipe: Recipe, saved: SavedRun, device: str, cores: int) -> tuple[Recipe, list[str]]:
    """Set performance options of [compile] and [data.loader] that are unset (None) to those of a run's recipe.json.

    Options of [compile] are inherited only if the device is the same, options of [data.loader] only if the number of
    cores is the same too. The choice of JPEG decoders is not inherited here, but in `launch.jpeg_decoder`.

    Args:
        device: name of rank 0's device (`device_name`).
        cores: number of cores of rank 0.

    Returns:
        The recipe, and messages.
    """
    before, engine = saved.recipe, saved.engine
    compile_ = _fill_unset(recipe.compile, before.compile)
    loader = recipe.data.loader
    omitted = {"hw_decoder_load": None, "decode": None, "cpu_decode": None}
    if loader.memory_cache or loader.dali.decode == "window":  # which contradict a cache on the GPU
        omitted["gpu_cache"] = None
    dali = _fill_unset(loader.dali, dataclasses.replace(before.data.loader.dali, **omitted))
    loader = dataclasses.replace(_fill_unset(loader, before.data.loader), dali=dali)
    messages = []
    if engine.device != device and (ignored := _differences(recipe.compile, compile_)):
        messages.append(f"note: the run began on {engine.device}; its recipe.json is ignored for {', '.join(ignored)}")
        compile_ = recipe.compile
    if (engine.device, engine.cores) != (device, cores):
        loader = recipe.data.loader
    inherited = [
        *_differences(recipe.compile, compile_),
        *_differences(recipe.data.loader, loader),
        *_differences(recipe.data.loader.dali, loader.dali),
    ]
    if inherited:
        messages.append(f"from the run's recipe.json: {', '.join(inherited)}")
    return dataclasses.replace(recipe, compile=compile_, data=dataclasses.replace(recipe.data, loader=loader)), messages


def _fill_unset(options: T, before: T) -> T:
    """Return `options` with fields that are None replaced by those of `before`."""
    names = [f.name for f in dataclasses.fields(options)]  # type: ignore[arg-type]
    return dataclasses.replace(options, **{n: getattr(before, n) for n in names if getattr(options, n) is None})  # type: ignore[type-var]


def _differences(before: Any, after: Any) -> list[str]:
    """Return the fields that differ, formatted as command-line options with the values of `after`."""
    values = [(f.name, getattr(before, f.name), getattr(after, f.name)) for f in dataclasses.fields(after)]
    return [
        f"--{name.replace('_', '-')} {new}"
        for name, old, new in values
        if old != new and not dataclasses.is_dataclass(new)
    ]

"""The file in which measured choices are kept, for every later run on such a machine.

    {"version": 1, "entries": [
        {"part": "model", "key": {"device": ..., "torch": ..., ...}, "values": {"compile": "default", ...},
         "figures": {"compile": "off 900 images/s, default 1,200 images/s"}, "measured": "2026-01-31"}, ...]}

part: "model" (how it runs) or "input" (how its loader works). key: all that the choice depends on (`model_key`,
`input_key`). values: by the names of the options. figures: what was measured, for people. An entry is used where its
whole key is the run's. Nothing about this file ever stops a run: what cannot be used is said in a line, and defaults
are used. Nor does one checkout spoil what another has measured: entries that it cannot read stay in the file.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import xxhash
from filelock import FileLock, Timeout

import fat
from fat.kernels import MODES
from launch.config.recipe import Form, Recipe
from launch.engine.execution import FORMATS, Mode, choose
from launch.feed import Feed
from launch.machine.provenance import device_name, installed_version, versions
from launch.tuning.trials import Choice, Value
from pipeline.decode.choose import chosen_loader
from pipeline.options import DaliOptions, LoaderOptions
from pipeline.storage.remote_client import is_remote
from shards.errors import UserError
from shards.files.durable import durable_write
from shards.files.output import check_output
from shards.ranges import allows
from shards.redact import redacted

VERSION = 1
LOCK_SECONDS = 10.0  # to wait for another writer; the other ranks of a run wait as well meanwhile
_REMEDY = "name another file, or --tuned off"
Part = Literal["model", "input"]
PARTS: tuple[Part, ...] = get_args(Part)


# What each part chooses, and what values make sense.
NAMES: dict[Part, dict[str, Callable[[Any], bool]]] = {
    "model": {
        "memory_format": lambda value: value in FORMATS,
        "kernels": lambda value: value in MODES,
        "compile": lambda value: value in get_args(Mode),
        "optimizer_form": lambda value: value in get_args(Form),
    },
    "input": {
        **{
            name: functools.partial(allows, LoaderOptions, name)
            for name in ("read_threads", "read_ahead", "decode_threads", "decode_ahead")
        },
        **{name: functools.partial(allows, DaliOptions, name) for name in ("preallocate_width", "preallocate_height")},
    },
}


def sensible(part: Part, values: Any) -> bool:
    """Whether these are values of this part's options."""
    names = NAMES.get(part, {})
    return isinstance(values, dict) and all(name in names and names[name](value) for name, value in values.items())


@dataclass(frozen=True)
class Entry:
    """What was measured once."""

    part: Part
    key: dict[str, Any]
    values: dict[str, Value]
    figures: dict[str, str]
    measured: str
    """The day."""


class Damaged(UserError):
    """A file that cannot be read as what it should be."""


class NoJson(Damaged):
    """A file that holds nothing worth keeping."""


def file_of(tuned: str) -> Path | None:
    """The file that `--tuned` names; None = off."""
    if tuned == "auto":
        tuned = os.environ.get("FAT_TUNED", "auto")
    if tuned == "off":
        return None
    if tuned != "auto":
        return Path(tuned)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "fat-pipeline" / "tuned.json"


def read(path: Path) -> list[Entry]:
    """The entries of a file that can be read; none where there is no file.

    Raises:
        Damaged: there is one, but not of this kind and version.
    """
    return _load(path)[0]


def _load(path: Path) -> tuple[list[Entry], list[tuple[Any, str]]]:
    """(entries of a file, those that cannot be read, as they are, and why).

    Raises:
        Damaged: there is a file, but not of this kind and version.
    """
    remedy = "remove it, or name another with --tuned"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return [], []
    except OSError as error:
        raise Damaged(f"{path}: cannot be read ({error.strerror or error}); {remedy}") from error
    except ValueError as error:
        raise NoJson(f"{path}: no JSON ({error}); 'pipeline tune' writes it anew") from error
    if not isinstance(content, dict) or "version" not in content or not isinstance(content.get("entries"), list):
        raise Damaged(f"{path}: no file of measured choices; {remedy}")
    if content["version"] != VERSION:
        raise Damaged(f"{path}: of version {content['version']}, this checkout reads {VERSION}; {remedy}")
    entries, strange = list[Entry](), list[tuple[Any, str]]()
    for raw in content["entries"]:
        try:
            entries.append(_entry(raw))
        except (ValueError, TypeError) as error:
            strange.append((raw, str(error)))
    return entries, strange


def _entry(raw: Any) -> Entry:
    """Raises ValueError or TypeError where it is none that this checkout knows."""
    if not isinstance(raw, dict):
        raise ValueError(f"{raw!r} is no entry")
    entry = Entry(**raw)
    if entry.part not in PARTS or not sensible(entry.part, entry.values):
        raise ValueError(f"no values of model or input: {entry.part} {entry.values}")
    if not isinstance(entry.key, dict) or not isinstance(entry.figures, dict):
        raise ValueError(f"key or figures are no names with values: {entry.key}, {entry.figures}")
    return entry


def find(path: Path, part: Part, key: Mapping[str, Any]) -> tuple[dict[str, Value], str]:
    """(values measured under this very key, a line for people about why there are none).

    The line is empty where the file has nothing about this part, as before anything was measured.
    """
    try:
        read, strange = _load(path)
    except Damaged as error:
        return {}, f"warning: {error}; defaults are used"
    entries = [entry for entry in read if entry.part == part]
    skipped = f"warning: {path}: {len(strange)} entries cannot be read ({strange[0][1]}); skipped" if strange else ""
    if not entries:
        return {}, skipped

    def differing(entry: Entry) -> list[str]:
        return [name for name in {**key, **entry.key} if key.get(name) != entry.key.get(name)]

    nearest = min(entries, key=lambda entry: len(differing(entry)))
    if not (names := differing(nearest)):
        return nearest.values, ""
    facts = ", ".join(f"{name} {nearest.key.get(name)}, here {key.get(name)}" for name in names)
    return {}, f"note: {path}: the nearest measurement of the {part} is of {facts}; defaults are used"


def check_place(path: Path) -> None:
    """Check before measuring that `keep` can write the file.

    Raises:
        UserError: it cannot be written, or holds what this checkout cannot read.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error
    check_output(path, "--tuned")
    with contextlib.suppress(NoJson):  # is replaced
        _load(path)


def keep(path: Path, entry: Entry) -> None:
    """Put an entry into the file, on top of one with the same key; a file that is no JSON is replaced.

    Raises:
        UserError: the file cannot be written, or holds what this checkout cannot read.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with FileLock(path.with_name(f"{path.name}.lock"), timeout=LOCK_SECONDS):
            try:
                read, strange = _load(path)
            except NoJson:
                read, strange = [], []
            entries = {_identity(old): old for old in read}
            if (old := entries.pop(_identity(entry), None)) is not None:
                entry = replace(entry, values=old.values | entry.values, figures=old.figures | entry.figures)
            ours = [redacted(asdict(kept)) for kept in (*entries.values(), entry)]
            content = {"version": VERSION, "entries": [*(raw for raw, _ in strange), *ours]}
            durable_write(path, (json.dumps(content, indent=1) + "\n").encode())
    except Timeout as error:
        raise UserError(
            f"--tuned {path}: not written, {path.name}.lock beside it has been held for {LOCK_SECONDS:g} s; try again "
            f"when its holder has gone, or {_REMEDY}"
        ) from error
    except NotImplementedError as error:
        raise UserError(f"--tuned {path}: not written, its file system has no locks ({error}); {_REMEDY}") from error
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(f"--tuned {path}: cannot be written ({error.strerror or error}); {_REMEDY}")


def _identity(entry: Entry) -> str:
    return json.dumps([entry.part, entry.key], sort_keys=True)


def entry_of(part: Part, key: dict[str, Any], found: Mapping[str, Choice]) -> Entry:
    """An entry measured today."""
    values = {name: choice.value for name, choice in found.items()}
    figures = {name: choice.reason for name, choice in found.items()}
    return Entry(part, key, values, figures, time.strftime("%Y-%m-%d"))


def key_of(part: Part, recipe: Recipe, feed: Feed, *, given: Mapping[str, Value | None], ranks: int) -> dict[str, Any]:
    """All that the choices of a part depend on.

    Args:
        given: options that are not open (other parts' too): what is measured beside one value of them says nothing of
            runs with another.
        ranks: of the training.
    """
    key = model_key(recipe, feed, ranks=ranks) if part == "model" else input_key(recipe, feed)
    return key | {"given": {name: given[name] for name in NAMES[part] if given.get(name) is not None}}


def model_key(recipe: Recipe, feed: Feed, *, ranks: int) -> dict[str, Any]:
    """All that the fastest way to run the model depends on, but for what is given."""
    device, (zero, precision) = feed.world.device, choose(recipe, feed.world.device, ranks=ranks)
    libraries = versions() | {"triton": installed_version("triton")}
    return {
        "device": device_name(device),
        **({"cores": feed.world.cores} if device.type == "cpu" else {}),
        **{name: libraries[name] for name in ("torch", "triton", *(("deepspeed",) if zero else ()))},
        "fat": _sources(),
        "variant": recipe.model.variant,
        "freeze_bn": recipe.model.freeze_bn,
        "size": recipe.data.size,
        "micro_batch": feed.shape.micro_rows,
        "accumulated": feed.shape.accumulation > 1,
        "precision": precision,
        "zero": zero,
        "optimizer": recipe.optim.optimizer,
        "ranks": "several" if ranks > 1 else 1,
        **({"sync_bn": recipe.run.sync_bn} if ranks > 1 else {}),
    }


@functools.cache
def _sources() -> str:
    """A digest of model and kernels, whose changes are made for speed."""
    root, digest = Path(fat.__file__).parent, xxhash.xxh3_64()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def input_key(recipe: Recipe, feed: Feed) -> dict[str, Any]:
    """All that the fastest way to load depends on, but for what is given."""
    device, split = feed.world.device, feed.dataset.split("train")
    libraries = versions()
    return {
        "device": device_name(device),
        "cores": feed.world.cores,
        **{name: libraries[name] for name in ("torch", "nvidia-dali-cuda120", "numpy")},
        "loader": chosen_loader(recipe.data.loader, split),
        "size": recipe.data.size,
        "micro_batch": feed.shape.micro_rows,
        "augmentation": xxhash.xxh3_64_hexdigest(repr(feed.augment).encode()),
        "precision": choose(recipe, device, ranks=feed.world.size)[1],
        "set": split.index_hash,
        "remote": is_remote(recipe.data.location()),
    }

"""The recipe of a run: which options differ from their defaults, and which differ between runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launch.config.recipe import Recipe
from launch.report.loaded_run import LoadedRun
from launch.run.saved_recipe import SavedRun

_OWN = ("run.out", "run.dry_run")  # differ in every run, or say nothing about it


@dataclass(frozen=True)
class Option:
    section: str
    name: str
    value: str
    default: str

    @property
    def changed(self) -> bool:
        return self.value != self.default


@dataclass(frozen=True)
class Difference:
    """An option or version that is not the same in all runs."""

    name: str
    values: list[str]


def options(saved: SavedRun) -> list[Option]:
    """Return all options of a recipe."""
    defaults = dict(_flat(Recipe().to_dict()))
    return [
        Option(*name.rpartition(".")[::2], _text(value), _text(defaults.get(name)))
        for name, value in _flat(saved.recipe.to_dict())
        if name not in _OWN
    ]


def environment(saved: SavedRun) -> dict[str, str]:
    """Return versions, git state and kernels of the last start."""
    versions = {name: _text(version) for name, version in saved.versions.items()}
    kernels = {f"kernels, {name}": _text(value) for name, value in saved.kernels.items() if value not in ("", [], 0)}
    return {"git": saved.git or "unknown", **versions, **kernels}


def chosen(run: LoadedRun) -> dict[str, str]:
    """Return the values that the last start chose for options that were not set."""
    line = next((line for line in reversed(run.timeline.lines) if line["kind"] == "resolved"), {})
    return {name: _text(value) for name, value in line.items() if name not in ("kind", "time", "step")}


def differences(runs: Sequence[LoadedRun]) -> list[Difference]:
    """Return the options, machines and versions that are not the same in all runs, options first."""
    columns = [_comparable(run) for run in runs]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [Difference(name, [column.get(name, "-") for column in columns]) for name in names]
    return [row for row in rows if len(set(row.values)) > 1]


def _comparable(run: LoadedRun) -> dict[str, str]:
    if run.saved is None:
        return {}
    engine = run.saved.engine
    machine = {"ranks": str(engine.world), "device": engine.device, "precision": engine.precision}
    flags = {option.name: option.value for option in options(run.saved)}
    return flags | machine | environment(run.saved)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _text(value: Any) -> str:
    if value is None or value == "":
        return "not set"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list | tuple):
        return " ".join(map(_text, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)

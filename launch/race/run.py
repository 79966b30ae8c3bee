"""Run one training of a race, in its own run folder, or read the result of a finished one."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from launch.config.command_line import parse_for_set
from launch.config.recipe import Recipe
from launch.race.results import SeedResult, read_result
from launch.run.metrics_file import read_run
from launch.run.saved_recipe import RECIPE_NAME, read_saved_run
from launch.run.status import read_status
from launch.start.processes import default_processes, run_training
from shards.errors import UserError
from shards.redact import redacted

CHOSEN = ("--data", "--out", "--seed", "--target-top1", "--dry-run", "--resume")
"""Training options that the race sets, or that make no sense in it."""
# Sections whose options may differ when a race is resumed, because they do not change what is trained.
_FREE = ("parallel", "compile", "checkpoint", "log", "preempt", "watchdog")


class Racer:
    """Trains a recipe on a shard set until a top-1 accuracy is reached, once per seed.

    Args:
        training: training options.
        target: top-1 accuracy.
        processes: number of training processes; None: one per GPU.
        own: options of the command, which are not valid among the training options.

    Raises:
        UserError: the training options are invalid, or contain one that the race sets.
    """

    def __init__(
        self, dataset: str, training: Sequence[str], *, target: float, processes: int | None, own: Collection[str]
    ) -> None:
        for option in training:
            if (name := option.partition("=")[0].replace("_", "-")) in CHOSEN:
                raise UserError(f"{name}: a race sets this option itself; omit it")
        self._recipe = parse_for_set(dataset, training, own=own)
        self._dataset, self._training = dataset, tuple(training)
        self._target, self._processes = target, processes

    def run(self, seed: int, run: Path) -> SeedResult | int:
        """Train with a seed in the run folder `run`, unless it is finished; return the result.

        An interrupted run is resumed. If the training is stopped or fails, its exit status is returned.

        Raises:
            UserError: the run folder belongs to a training with other options.
        """
        self._check(seed, run)
        if not self._finished(run):
            options = ["--data", self._dataset, *self._training, "--seed", str(seed), "--out", str(run)]
            count = self._processes or default_processes()
            status = run_training(count, [*options, "--target-top1", str(self._target)])
            if status:
                return status
        return read_result(run, seed, self._target)

    def description(self) -> dict[str, Any]:
        """Return what identifies the race in its JSON file."""
        return {
            "dataset": redacted(self._dataset),
            "training": list(self._training),
            "target_top1": self._target,
        }

    def _finished(self, run: Path) -> bool:
        """Return whether the run has reached the target, or has done all steps."""
        if read_status(run) != "finished":
            return False
        lines = read_run(run)
        total = next(line["total_steps"] for line in reversed(lines) if line["kind"] == "start")
        return lines[-1]["step"] >= total or read_result(run, 0, self._target).reached

    def _check(self, seed: int, run: Path) -> None:
        """Check that an existing run was trained with the same options."""
        if not (run / RECIPE_NAME).exists():
            return
        expected = replace(self._recipe, run=replace(self._recipe.run, seed=seed))
        before, now = _identity(read_saved_run(run).recipe), _identity(expected)
        changed = [f"{name} was {before[name]}, now {value}" for name, value in now.items() if before[name] != value]
        if changed:
            raise UserError(
                f"{run}: was trained with other options ({'; '.join(changed)}); use the same options, or another --out"
            )


def _identity(recipe: Recipe) -> dict[str, Any]:
    """Return the options that determine what a run trains, by their names in a recipe file."""
    sections = json.loads(json.dumps(recipe.to_dict(), default=str))
    for name in ("out", "target_top1", "dry_run"):
        del sections["run"][name]
    for name in ("loader", "cache", "cache_size", "cache_shared", "micro_batch", "eval_batch"):
        del sections["data"][name]
    kept = {name: values for name, values in sections.items() if name not in _FREE}
    return {f"[{section}] {name}": value for section, values in kept.items() for name, value in values.items()}

"""The run folder: what a run writes, and how it goes on from there."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import fat
from launch.checkpoint import Checkpoint, CheckpointError, CheckpointFolder, Progress
from launch.engine import Engine
from launch.feed import Feed
from launch.recipe import Recipe
from launch.report import draw_curves
from shards.errors import UserError

RECIPE_NAME = "recipe.json"
LIBRARIES = ("torch", "nvidia-dali-cuda120", "accelerate", "deepspeed", "numpy")


class RunFolder:
    """RUN/: recipe.json, metrics.jsonl, checkpoints/, weights.safetensors, curves.png. Written by rank 0 alone.

    Every method that takes part in saving is collective: all ranks call it.
    """

    def __init__(self, recipe: Recipe, feed: Feed, engine: Engine) -> None:
        self.path = recipe.run.out
        self.story: list[str] = []
        """Lines for people: what was found, what was written."""
        self._recipe, self._feed, self._engine = recipe, feed, engine
        self._checkpoints = CheckpointFolder(self.path / "checkpoints", keep=recipe.run.keep)
        self._fingerprint = fingerprint(recipe, feed)

    def resume(self) -> Progress:
        """Load the newest whole checkpoint into the engine, if the recipe says so and there is one; describe the run.

        Raises:
            CheckpointError: it belongs to another run.
            UserError: the folder cannot be written.
        """
        world, plan, run = self._engine.world, self._feed.plan, self._recipe.run
        found, complaints = self._checkpoints.newest() if run.resume == "auto" else (None, [])
        if found is not None:
            check_fingerprint(found, self._fingerprint)
            self._engine.load_state_dict(found.load(), steps=found.progress.step)
        world.barrier()  # no rank may write before every rank has looked
        if world.is_main:
            self._describe()
        self.story = [f"warning: {complaint}" for complaint in complaints]
        self.story.append(
            f"fat_{self._recipe.model.variant} on {world.size} x {world.device.type}, {self._engine.description}; "
            f"{plan.samples} images of {self._feed.dataset.path}, {plan.steps_per_epoch} steps of {plan.global_batch} "
            f"per epoch, {plan.lanes} lanes"
        )
        self.story.append(f"going on from {found.path}" if found else f"starting in {self.path}")
        return found.progress if found else Progress()

    def save(self, progress: Progress) -> Progress:
        """Write a checkpoint; returns `progress`."""
        state = self._engine.state_dict()
        if self._engine.world.is_main:
            self._checkpoints.save(state, progress, self._fingerprint)
        self._engine.world.barrier()
        return progress

    def finish(self) -> None:
        """Export the weights and draw the curves."""
        self.story = []
        state = self._engine.state_dict()
        if not self._engine.world.is_main:
            return
        model = fat.create_model(
            f"fat_{self._recipe.model.variant}", num_classes=len(self._feed.dataset.manifest.classes)
        )
        model.load_state_dict({k.removeprefix("model/"): v for k, v in state.items() if k.startswith("model/")})
        fat.save_weights(model, self.path / "weights.safetensors")
        self.story.append(f"wrote {self.path / 'weights.safetensors'} and {draw_curves(self.path)}")

    def _describe(self) -> None:
        engine = self._engine
        description = {
            "recipe": self._recipe.to_dict(),
            "engine": {"zero": engine.zero, "precision": engine.precision, "world": engine.world.size},
            "versions": {"python": platform.python_version(), **{name: _version(name) for name in LIBRARIES}},
            "git": _git_state(),
        }
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / RECIPE_NAME).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"{self.path}: the run folder cannot be written ({error.strerror}); choose another with --out"
            ) from error


def fingerprint(recipe: Recipe, feed: Feed) -> dict[str, Any]:
    """What decides the order of the data and the meaning of a step; every checkpoint holds it."""
    plan = feed.plan
    return {
        "variant": recipe.model.variant,
        "global_batch": plan.global_batch,
        "lanes": plan.lanes,
        "window": plan.window,
        "seed": plan.seed,
        "epochs": recipe.optim.epochs,
        "train_samples": plan.samples,
        "train_index": feed.dataset.split("train").index_hash,
    }


def check_fingerprint(found: Checkpoint, current: dict[str, Any]) -> None:
    """Refuse to resume a run as another one.

    Raises:
        CheckpointError: names each difference.
    """
    changed = [
        f"{key} was {found.fingerprint.get(key)}, is {value}"
        for key, value in current.items()
        if found.fingerprint.get(key) != value
    ]
    if changed:
        raise CheckpointError(
            f"{found.path}: saved by a different run ({'; '.join(changed)}); "
            "use the same options, another run folder (--out), or --resume never"
        )


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_state() -> str | None:
    """`git describe` of the source tree; None where it is no checkout."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None

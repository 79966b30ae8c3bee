"""The run folder: what a run writes, and how it goes on from there."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from safetensors import SafetensorError

import fat
from launch.checkpoint import BackgroundWriter, Checkpoint, CheckpointError, CheckpointFolder, Progress
from launch.choices import RECIPE_NAME, Choices
from launch.engine import Engine
from launch.feed import Feed
from launch.folder_lock import unwritable
from launch.guards import RunFailed
from launch.kernel_check import Verdict
from launch.masters import AVERAGE
from launch.metrics import METRICS_NAME
from launch.preempt import Preempted
from launch.provenance import git_state, versions
from launch.recipe import Recipe
from launch.report import draw_curves
from launch.status import Status, read_status, write_status
from launch.world import share
from shards.durable import durable_write
from shards.errors import UserError

CHECKPOINTS = "checkpoints"


class RunFolder:
    """RUN/: recipe.json, status, metrics.jsonl, checkpoints/, weights.safetensors, curves.png. Rank 0 alone writes.

    As a context manager it keeps RUN/status true: running, preempted, finished or failed, with step and reason.
    """

    def __init__(self, recipe: Recipe, feed: Feed, engine: Engine, choices: Choices, kernels: Verdict) -> None:
        self.path = recipe.run.out
        self._recipe, self._feed, self._engine, self._choices = recipe, feed, engine, choices
        self._kernels = kernels
        self._checkpoints = CheckpointFolder(self.path / CHECKPOINTS, keep=recipe.run.keep)
        self._writer = BackgroundWriter(self._checkpoints)
        self._fingerprint = fingerprint(recipe, feed)
        self._saved = Progress()

    def resume(self) -> tuple[Progress, list[str]]:
        """Load the newest whole checkpoint into the engine, if the recipe says so and there is one; describe the run.

        Collective: rank 0 chooses, all ranks read. Returns where the run stands, and lines for people.

        Raises:
            CheckpointError: it belongs to another run, or not every rank can read it.
            UserError: the folder cannot be written.
        """
        world, plan = self._engine.world, self._feed.plan
        found, story = share(self._choose if world.is_main else None, world)
        if found is not None:
            changed = check_fingerprint(found, self._fingerprint)
            story += [f"warning: {fact}; the run goes on with the new value" for fact in changed]
            try:
                state = found.load()
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"{found.path}: rank {world.rank} cannot read it ({error}); "
                    "the run folder (--out) must be on storage that all nodes share"
                ) from error
            self._engine.load_state_dict(state, steps=found.progress.step)
            self._saved = found.progress
        if world.is_main:
            self._describe()
        story.append(
            f"fat_{self._recipe.model.variant} on {world.size} x {world.device.type}, {self._engine.description}; "
            f"{plan.samples} images of {self._feed.dataset.path}, {plan.steps_per_epoch} steps of {plan.global_batch} "
            f"per epoch, {plan.lanes} lanes"
        )
        story.append(f"going on from {found.path}" if found else f"starting in {self.path}")
        return self._saved, story

    def _choose(self) -> tuple[Checkpoint | None, list[str]]:
        """The checkpoint to go on from, and lines for people; on rank 0."""
        if starts_afresh(self._recipe):
            aside = self._checkpoints.set_aside()
            metrics = self.path / METRICS_NAME
            if aside is not None and metrics.exists():
                metrics.rename(aside / METRICS_NAME)
            return None, [f"the earlier run's checkpoints and metrics are now in {aside}"] if aside else []
        found, complaints = self._checkpoints.newest()
        return found, [f"warning: {complaint}" for complaint in complaints]

    def save(self, progress: Progress) -> Progress:
        """Begin to write a checkpoint; returns `progress`. Collective; a thread writes while training goes on."""
        self._writer.wait()  # the engine stages every state in the same memory
        state = self._engine.state_dict()
        if self._engine.world.is_main:
            self._writer.save(state, progress, self._fingerprint)
        self._saved = progress
        return progress

    def leave(self, progress: Progress, reason: str) -> NoReturn:
        """Save, wait for it, and end the run in good order. Collective.

        Raises:
            Preempted: saved.
            RunFailed: not saved, although tried twice.
        """
        for _ in range(2):
            self.save(progress)
            main = self._engine.world.is_main
            if share(self._writer.wait if main else None, self._engine.world):
                raise Preempted(reason or "another rank's request")
        raise RunFailed(f"asked to leave ({reason}), but the checkpoint could not be written, twice")

    def complaints(self) -> list[str]:
        """Checkpoints that could not be written since the last call."""
        return self._writer.complaints()

    def finish(self) -> list[str]:
        """Wait for the last checkpoint, export the weights, draw the curves. Collective. Returns lines for people."""
        self._writer.wait()
        state = self._engine.state_dict()
        if not self._engine.world.is_main:
            return []
        story = [f"warning: {complaint}" for complaint in self.complaints()]
        model = fat.create_model(f"fat_{self._recipe.model.variant}", num_classes=self._feed.classes)
        raw = {key.removeprefix("model/"): value for key, value in state.items() if key.startswith("model/")}
        average = {key.removeprefix(f"{AVERAGE}/"): value for key, value in state.items() if key.startswith(AVERAGE)}
        for name, tensors in (("weights", raw), ("weights-ema", raw | average if average else {})):
            if tensors:
                fat.save_weights(model, self.path / f"{name}.safetensors", state=tensors)
                story.append(f"wrote {self.path / name}.safetensors")
        story.append(f"wrote {draw_curves(self.path)}")
        return story

    def __enter__(self) -> RunFolder:
        self._status("running")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()
        for complaint in self.complaints():
            print(f"warning: {complaint}", file=sys.stderr, flush=True)
        if kind is None:
            self._status("finished")
        elif issubclass(kind, Preempted):
            self._status("preempted", str(error))
        elif read_status(self.path) in {None, "running"}:  # else another rank has said why this one was cut off
            refused = isinstance(error, UserError) and error.exit_code == UserError.exit_code
            self._status("refused" if refused else "failed", f"{kind.__name__}: {error}")

    def _status(self, status: Status, reason: str = "") -> None:
        if self._engine.world.is_main:
            write_status(self.path, status, step=self._saved.step, reason=reason)

    def _describe(self) -> None:
        engine = self._engine
        description = {
            "recipe": self._recipe.to_dict(),
            "engine": {"zero": engine.zero, "precision": engine.precision, "world": engine.world.size},
            "choices": self._choices.record(self._feed),
            "kernels": self._kernels.to_dict(),
            "versions": versions(),
            "git": git_state(),
        }
        try:
            durable_write(self.path / RECIPE_NAME, (json.dumps(description, indent=1) + "\n").encode())
        except OSError as error:
            raise unwritable(self.path, error) from error


def starts_afresh(recipe: Recipe) -> bool:
    """Whether checkpoints in the run folder are another run's: 'never' is about the run as it was when the job was
    submitted, not about the job's own earlier starts."""
    return recipe.run.resume == "never" and os.environ.get("SLURM_RESTART_COUNT", "0") == "0"


def goes_on(recipe: Recipe) -> bool:
    """Whether the run folder holds a part of this run."""
    return not starts_afresh(recipe) and any((recipe.run.out / CHECKPOINTS).glob("step-*"))


def saved_recipe(run: Path) -> dict[str, Any]:
    """The recipe of a run, as its folder has it: sections model, data, optim, run.

    Raises:
        UserError: no readable recipe there.
    """
    try:
        return dict(json.loads((run / RECIPE_NAME).read_text(encoding="utf-8"))["recipe"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{run / RECIPE_NAME}: not a readable recipe ({error}); give a run folder") from error


def fingerprint(recipe: Recipe, feed: Feed) -> dict[str, Any]:
    """What every checkpoint holds of its run: `fixed` decides what is fed and what a step means, `free` may change."""
    plan, optim = feed.plan, recipe.optim
    return {
        "fixed": {
            "variant": recipe.model.variant,
            "global_batch": plan.global_batch,
            "lanes": plan.lanes,
            "window": plan.window,
            "seed": plan.seed,
            "epochs": optim.epochs,
            "train_samples": plan.samples,
            "train_index": feed.dataset.split("train").index_hash,
            "augmentation": repr(feed.augment),
        },
        "free": {
            name: getattr(optim, name)
            for name in ("optimizer", "lr", "warmup_epochs", "weight_decay", "clip_grad", "label_smoothing", "ema")
        },
    }


def check_fingerprint(found: Checkpoint, current: dict[str, Any]) -> list[str]:
    """Refuse to resume a run as another one; returns what else differs.

    Raises:
        CheckpointError: names each difference that would change what is fed or what a step means.
    """

    def changes(kind: str) -> list[str]:
        before = found.fingerprint.get(kind, {})
        return [
            f"{key} was {before.get(key)}, is {value}"
            for key, value in current[kind].items()
            if before.get(key) != value
        ]

    if changed := changes("fixed"):
        raise CheckpointError(
            f"{found.path}: saved by a different run ({'; '.join(changed)}); "
            "use the same options, another run folder (--out), or --resume never, which sets the old one aside"
        )
    return changes("free")

"""The run folder: what a run writes, and how it goes on from there."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import NoReturn, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor

import fat
from launch.config.recipe import Recipe
from launch.engine.build import config_of
from launch.engine.engine import Engine
from launch.engine.kernel_check import KernelCheckResult
from launch.engine.zero_state import weights_of
from launch.feed import Feed
from launch.machine.provenance import device_name, git_state, versions
from launch.machine.world import broadcast_from_rank0
from launch.run.checkpoint import Checkpoint
from launch.run.checkpoint_folder import CheckpointFolder
from launch.run.checkpoint_writer import MAX_FAILURES, BackgroundWriter
from launch.run.curves import draw_curves
from launch.run.files import check_writable, unwritable
from launch.run.fingerprint import check_classes, check_fingerprint, check_position, fingerprint
from launch.run.metrics_file import METRICS_NAME, check_metrics
from launch.run.progress import Progress
from launch.run.saved_recipe import CLASSES_NAME, RECIPE_NAME
from launch.run.status import STATUS_NAME, Preempted, RunFailed, Status, read_content, write_status
from shards.errors import UserError, first_line
from shards.files.durable import durable_write, is_temporary
from shards.redact import printable, redacted

T = TypeVar("T")

CHECKPOINTS = "checkpoints"
AGAIN = "correct that, then start the run again: it resumes"

# Names of files whose temporary files a killed process may leave.
_WRITTEN = r"probe|recipe\.json|classes\.json|status|curves\.png|weights(-ema)?\.safetensors"


class RunFolder:
    """RUN/: recipe.json, classes.json, status, metrics.jsonl, checkpoints/, weights.safetensors, curves.png.

    Rank 0 alone writes. As a context manager it keeps RUN/status true: running, preempted, finished or failed, with
    step and reason.
    """

    def __init__(self, recipe: Recipe, feed: Feed, engine: Engine, kernels: KernelCheckResult) -> None:
        self.path = recipe.run.out
        self._recipe, self._feed, self._engine = recipe, feed, engine
        self._kernels = kernels
        self._info = fat.WeightsInfo(
            config=config_of(recipe, feed.classes),
            classes=feed.class_list,
            size=recipe.data.size,
            crop_pct=recipe.data.crop_pct,
        )
        self._checkpoints = CheckpointFolder(self.path / CHECKPOINTS, keep=recipe.checkpoint.keep, info=self._info)
        self._writer = BackgroundWriter(self._checkpoints)
        self._fingerprint = fingerprint(recipe, feed)
        self._resumed = Progress()

    def resume(self) -> tuple[Progress, list[str]]:
        """Load the newest whole checkpoint into the engine, if the recipe says so and there is one; describe the run.

        Collective: rank 0 chooses, all ranks read. Returns where the run stands, and lines for people.

        Raises:
            CheckpointError: it belongs to another run, or not every rank can read it.
            StorageFailed: a checkpoint that may be whole cannot be read.
            UserError: the folder cannot be written.
        """
        world, plan = self._engine.world, self._feed.plan
        found, story = broadcast_from_rank0(self._choose, world)
        if found is not None:
            changed = check_fingerprint(found, self._fingerprint)
            check_position(found, plan.steps_per_epoch)
            story += [f"warning: {fact}; the run goes on with the new value" for fact in changed]
            self._engine.load_state_dict(found.load(), steps=found.progress.step)
            self._resumed = found.progress
        if world.is_main:
            self._describe()
        story.append(
            f"fat_{self._recipe.model.variant} on {world.size} x {world.device.type}, {self._engine.description}; "
            f"{plan.samples} images of {self._feed.dataset.path}, {plan.steps_per_epoch} steps of {plan.global_batch} "
            f"per epoch, {plan.lanes} lanes"
        )
        story.append(f"going on from {found.path}" if found else f"starting in {self.path}")
        return self._resumed, story

    def _choose(self) -> tuple[Checkpoint | None, list[str]]:
        """The checkpoint to go on from, and lines for people; on rank 0."""
        check_metrics(self.path)
        self._tidy_up()
        self._checkpoints.prepare()
        if self._recipe.checkpoint.resume == "never":
            aside = self._set_aside()
            return None, [f"the earlier run's checkpoints and metrics are now in {aside}"] if aside else []
        found, complaints = self._checkpoints.newest()
        if found is not None:
            check_classes(found, self._feed.class_list, run=self.path)
        story = [f"warning: {complaint}" for complaint in complaints]
        if found is None and complaints:  # otherwise new checkpoints of the same steps would overwrite them
            story.append(
                "warning: no checkpoint is whole, so the run starts from the beginning; the damaged ones and the "
                f"metrics are now in {self._set_aside()}"
            )
        return found, story

    def _set_aside(self) -> Path | None:
        """Move the checkpoints, and with them the metrics, out of the way; where to, if there were any checkpoints."""
        aside = self._checkpoints.set_aside()
        metrics = self.path / METRICS_NAME
        try:
            if aside is not None and metrics.exists():
                metrics.rename(aside / METRICS_NAME)
        except OSError as error:
            raise unwritable(self.path, error) from error
        return aside

    def _tidy_up(self) -> None:
        """Check that files can be written, and remove temporary files of trainers that were killed."""
        try:
            check_writable(self.path)
            for name in os.listdir(self.path):
                if is_temporary(name, _WRITTEN):
                    (self.path / name).unlink(missing_ok=True)
        except OSError as error:
            raise unwritable(self.path, error) from error

    def save(self, progress: Progress) -> Progress:
        """Begin to write a checkpoint; returns `progress`. Collective; a thread writes while training goes on.

        Raises:
            RunFailed: the last `MAX_FAILURES` saves have failed.
        """
        self._writer.wait()  # the engine stages every state in the same memory
        failures, reason = self._on_main(lambda: (self._writer.failures, self._writer.reason))
        if failures >= MAX_FAILURES:
            raise RunFailed(
                f"{failures} checkpoints in a row could not be written, the last: {reason}; the run ends here, because "
                "further training would be lost. Free some space or correct the permissions, then start it again"
            )
        state = self._engine.state_dict()
        if self._engine.world.is_main:
            self._writer.save(state, progress, self._fingerprint)
        return progress

    def save_and_stop(self, progress: Progress, reason: str) -> NoReturn:
        """Save, wait for it, and end the run in good order. Collective.

        Raises:
            Preempted: saved.
            RunFailed: not saved, although tried twice.
        """
        if self._save_durably(progress):
            raise Preempted(reason or "another rank's request")
        raise RunFailed(f"asked to leave ({reason}), but the checkpoint could not be written, twice")

    def _save_durably(self, progress: Progress) -> bool:
        """Save, and wait for it; once more if that fails. Collective."""
        for _ in range(2):
            self.save(progress)
            if self._on_main(self._writer.wait):
                return True
        return False

    def _on_main(self, make: Callable[[], T]) -> T:
        """Call `make` on rank 0 and return its result on every rank. Collective."""
        return broadcast_from_rank0(make, self._engine.world)

    def complaints(self) -> list[str]:
        """Checkpoints that could not be written since the last call."""
        return self._writer.complaints()

    def finish(self, progress: Progress) -> list[str]:
        """Wait for the last checkpoint, export the weights, draw the curves. Collective. Returns messages.

        Raises:
            RunFailed: the last checkpoint or the weights could not be written, so the run is not finished.
        """
        if not (self._on_main(self._writer.wait) or self._save_durably(progress)):
            raise RunFailed(f"the last checkpoint, of step {progress.step}, could not be written; {AGAIN}")
        state = self._engine.state_dict()
        return self._on_main(lambda: self._export(state, progress.step))

    def _export(self, state: dict[str, Tensor], step: int) -> list[str]:
        story = [f"warning: {complaint}" for complaint in self.complaints()]
        with torch.device("meta"):  # only its config is needed
            model = fat.FAT(config_of(self._recipe, self._feed.classes))
        info = replace(self._info, step=step)
        for name, average in (("weights", False), ("weights-ema", True)):
            path, tensors = self.path / f"{name}.safetensors", weights_of(state, average=average)
            if tensors:
                try:
                    fat.save_weights(model, path, state=tensors, info=info)
                except (OSError, SafetensorError) as error:
                    fact = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
                    raise RunFailed(f"{path}: the weights could not be written ({fact}); {AGAIN}") from error
                story.append(f"wrote {path}")
        try:
            picture = draw_curves(self.path, warn=lambda fact: story.append(f"warning: {fact}"))
            story.append(f"wrote {picture}")
        except Exception as error:  # a plot must not fail a run whose weights are saved
            story.append(f"warning: no curves were drawn ({first_line(error) or type(error).__name__})")
        return story

    def __enter__(self) -> RunFolder:
        self._status("running")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()
        for complaint in self.complaints():
            print(f"warning: {printable(complaint)}", file=sys.stderr, flush=True)
        if kind is None:
            if not self._status("finished"):
                print(f"warning: {self.path / STATUS_NAME} could not be written; the run is finished", file=sys.stderr)
        elif issubclass(kind, Preempted):
            self._status("preempted", str(error))
        else:
            self._status_of_failure(kind, error)

    def _status_of_failure(self, kind: type[BaseException], error: BaseException | None) -> None:
        found = read_content(self.path)
        if found is None or found.status == "running":
            refused = isinstance(error, UserError) and error.exit_code == UserError.exit_code
            self._status("refused" if refused else "failed", f"{kind.__name__}: {error}")
        elif found.step is None:  # another rank has said why this one was cut off, but does not know the checkpoints
            self._status(found.status, found.reason, found.nodes or ())

    def _status(self, status: Status, reason: str = "", nodes: Sequence[str] = ()) -> bool:
        if not self._engine.world.is_main:
            return True
        saved = self._writer.saved or self._resumed
        best = (saved.best, saved.best_of) if saved.best_of else None
        return write_status(self.path, status, step=saved.step, reason=reason, nodes=nodes, best=best)

    def _describe(self) -> None:
        engine = self._engine
        description = {
            "recipe": self._recipe.to_dict(),
            "engine": {
                "zero": engine.zero,
                "precision": engine.precision,
                "world": engine.world.size,
                "device": device_name(engine.world.device),
                "cores": engine.world.cores,
            },
            "kernels": asdict(self._kernels),
            "versions": versions(),
            "git": git_state(),
        }
        classes = self._feed.class_list.dumps() + "\n"
        try:
            durable_write(self.path / RECIPE_NAME, (json.dumps(redacted(description), indent=1) + "\n").encode())
            durable_write(self.path / CLASSES_NAME, classes.encode())
        except OSError as error:
            raise unwritable(self.path, error) from error


def will_resume(recipe: Recipe) -> bool:
    """Whether the run folder holds a part of this run.

    Raises:
        StorageFailed: the checkpoints cannot be listed.
    """
    out = recipe.run.out
    return out.is_dir() and recipe.checkpoint.resume == "auto" and not CheckpointFolder(out / CHECKPOINTS).is_empty()

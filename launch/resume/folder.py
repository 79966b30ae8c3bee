"""The run folder: all files of a run, and how the run is resumed from them."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import NoReturn, TypeVar

from torch import Tensor

from launch.config.recipe import Recipe
from launch.engine.engine import Engine
from launch.engine.kernel_check import KernelCheckResult
from launch.feed import Feed
from launch.machine.provenance import device_name, git_state, versions
from launch.machine.world import broadcast_from_rank0
from launch.resume.decision import ResumeDecision
from launch.resume.fingerprint import fingerprint
from launch.resume.local_checkpoints import LocalCheckpoints, load_on_rank0
from launch.resume.resumption import Resumption
from launch.run.checkpoint import Checkpoint, CheckpointError
from launch.run.checkpoint_folder import CHECKPOINTS, CheckpointFolder
from launch.run.checkpoint_writer import MAX_FAILURES, BackgroundWriter
from launch.run.files import check_writable, unwritable
from launch.run.metrics_file import check_metrics
from launch.run.origin import Origin, Origins, read_origins
from launch.run.progress import Progress
from launch.run.saved_recipe import CLASSES_NAME, RECIPE_NAME
from launch.run.status import (
    RESUME_HINT,
    STATUS_NAME,
    Preempted,
    RunFailed,
    Status,
    StatusRenewal,
    read_content,
    write_status,
)
from launch.run.weights_files import WeightsFiles, all_weights_files, describe_weights
from shards.errors import UserError
from shards.files.durable import durable_write, is_temporary
from shards.redact import printable, redacted

T = TypeVar("T")

# Names of files whose temporary copies are removed at the start, because a killed process may have left them.
_WRITTEN = (
    r"probe|origin\.json|recipe\.json|classes\.json|status|curves\.png|(weights(-ema)?-(best|last)|evaluation)\.safetensors"
    r"|(first-batch|hardest)\.jpg"
)


class RunFolder:
    """RUN/: recipe.json, classes.json, status, metrics.jsonl, checkpoints/, weights-*.safetensors.

    Only rank 0 writes. As a context manager, it updates RUN/status (running, preempted, finished or failed) with step
    and reason.
    """

    def __init__(self, recipe: Recipe, feed: Feed, engine: Engine, kernels: KernelCheckResult) -> None:
        self.path = recipe.run.out
        self._recipe, self._feed, self._engine = recipe, feed, engine
        self._kernels = kernels
        info = describe_weights(recipe, feed)
        self._checkpoints = CheckpointFolder(self.path / CHECKPOINTS, keep=recipe.checkpoint.keep, info=info)
        self._weights = WeightsFiles(self.path, info)
        options = recipe.checkpoint
        self._local: LocalCheckpoints | None = None
        on_saved: Callable[[Path], object] = lambda path: None  # noqa: E731
        if options.local_checkpoint_every is not None and engine.world.is_main:
            self._local = LocalCheckpoints(options.local_checkpoint_dir, self.path, info=info)
            on_saved = partial(self._local.attach_to, new=True)
        self._writer = BackgroundWriter(self._checkpoints, self._weights, on_saved=on_saved)
        self._fingerprint = fingerprint(recipe, feed, teacher=engine.teacher.digest if engine.teacher else None)
        self._resumption = Resumption(
            self.path, feed, self._fingerprint, self._checkpoints, self._weights, local=self._local
        )
        self._resumed, self._origins = Progress(), Origins()
        self.has_checkpoint = False
        """Whether the run folder has an undamaged checkpoint, or one is being written; equal on all ranks."""
        self.chosen = False
        """Whether this start has returned the run to a checkpoint, or has branched from that of another run."""

    def resume(self) -> tuple[Progress, list[str]]:
        """Load the checkpoint that `--resume` chooses, if there is one, and write recipe.json.

        Collective: rank 0 chooses the checkpoint, all ranks read it. Files are moved only after all ranks have loaded
        it.

        Returns:
            The progress of the run, and messages.

        Raises:
            CheckpointError: the checkpoint belongs to another run, or not every rank can read it.
            StorageFailed: a checkpoint that may be undamaged cannot be read.
            UserError: the folder cannot be written.
        """
        world, plan = self._engine.world, self._feed.plan
        decision, found, messages = broadcast_from_rank0(self._choose_checkpoint, world)
        resumed = f"starting in {self.path}"
        if found is not None:
            is_local = decision.kind == "newest" and found.path.parent != self.path / CHECKPOINTS
            state = load_on_rank0(found, world) if is_local else found.load()
            self._engine.load_state_dict(state, steps=found.progress.step)
            messages += broadcast_from_rank0(lambda: self._resumption.carry_out(decision, found, state), world)
            self._resumed = self._resumption.first_progress(decision, found)
            if world.is_main:  # the previous trainer may have been killed after it wrote the checkpoint
                self._writer.save_weights(state, self._resumed)
            resumed = decision.describe(found, self.path)
            undamaged = decision.kind != "newest" or self._resumption.newest is not None
            self.has_checkpoint = broadcast_from_rank0(lambda: undamaged, world)
        self.chosen = decision.kind in ("rewind", "branch")
        self._origins = broadcast_from_rank0(lambda: read_origins(self.path), world)
        if world.is_main:
            self._write_description()
        epochs = self._recipe.optim.epochs
        messages.append(
            f"training {self._recipe.model.spec} on {world.size} x {world.device.type}, "
            f"{self._engine.description}: {plan.samples:,} images of {self._feed.dataset.path}, {epochs} "
            f"epoch{'s' if epochs > 1 else ''} of {plan.steps_per_epoch:,} steps, {plan.global_batch:,} images per step"
        )
        messages.append(resumed)
        return self._resumed, messages

    @property
    def origin(self) -> Origin | None:
        """The checkpoint that was chosen with `--resume`, if this start begins at it."""
        chosen = [self._origins.rewind, self._origins.branch]
        return next((each for each in chosen if each and each.step == self._resumed.step), None)

    def _choose_checkpoint(self) -> tuple[ResumeDecision, Checkpoint | None, list[str]]:
        """Return the checkpoint to resume from (None: start anew), and messages. Called only on rank 0."""
        check_metrics(self.path)
        self._remove_temporary_files()
        self._checkpoints.prepare()
        return self._resumption.choose()

    def _remove_temporary_files(self) -> None:
        """Check that files can be written, and remove temporary files of trainers that were killed."""
        try:
            check_writable(self.path)
            for name in os.listdir(self.path):
                if is_temporary(name, _WRITTEN):
                    (self.path / name).unlink(missing_ok=True)
        except OSError as error:
            raise unwritable(self.path, error) from error

    def save(self, progress: Progress) -> Progress:
        """Start to write a checkpoint in a background thread; return `progress`. Collective.

        Raises:
            RunFailed: the last `MAX_FAILURES` saves have failed.
        """
        self._writer.wait()  # because `state_dict` overwrites the tensors that the previous save writes
        failures, reason = self._on_main(lambda: (self._writer.failures, self._writer.reason))
        if failures >= MAX_FAILURES:
            raise RunFailed(
                f"{failures} consecutive checkpoints could not be written, the last with: {reason}; the run ends, "
                "because further training could be lost; free disk space or correct the permissions, then start again"
            )
        state = self._engine.state_dict()
        if self._engine.world.is_main:
            self._writer.save(state, progress, self._fingerprint)
        self.has_checkpoint = True
        return progress

    def save_locally(self, progress: Progress, *, metrics: bytes = b"") -> None:
        """Start to write a local checkpoint in a background thread. Collective. `save_errors` has its errors.

        Args:
            metrics: lines of metrics.jsonl that could not be written so far.
        """
        self._writer.wait()
        state = self._engine.state_dict()
        if (local := self._local) is not None:
            self._writer.run(lambda: local.save(state, progress, self._fingerprint, metrics=metrics))

    def save_and_stop(self, progress: Progress, reason: str) -> NoReturn:
        """Save, wait for the save and end the run by an exception. Collective.

        Raises:
            Preempted: the checkpoint was saved.
            RunFailed: saving failed twice.
        """
        if self._save_durably(progress):
            raise Preempted(reason or "another rank's request")
        raise RunFailed(f"asked to stop ({reason}), but two attempts to write the checkpoint failed")

    def _save_durably(self, progress: Progress) -> bool:
        """Save and wait for the save, with a second attempt if it fails; return whether it succeeded. Collective."""
        for _ in range(2):
            self.save(progress)
            if self._on_main(self._writer.wait):
                return True
        return False

    def _on_main(self, function: Callable[[], T]) -> T:
        """Call `function` on rank 0 and return its result on every rank. Collective."""
        return broadcast_from_rank0(function, self._engine.world)

    def save_errors(self) -> list[str]:
        """Return the errors of failed saves since the last call."""
        return self._writer.errors()

    def finish(self, progress: Progress) -> list[str]:
        """Wait for the last checkpoint and its weights files; return messages. Collective.

        Raises:
            RunFailed: the last checkpoint or the weights could not be written, so the run is not finished.
        """
        if not (self._on_main(self._writer.wait) or self._save_durably(progress)):
            raise RunFailed(f"the last checkpoint, of step {progress.step}, could not be written; {RESUME_HINT}")
        if self._on_main(lambda: self._writer.weights_step) != progress.step:
            state = self._engine.state_dict()
            self._on_main(lambda: self._save_last_weights(state, progress))
        warnings = [f"warning: {error}" for error in self.save_errors()]
        return [*warnings, *(f"wrote {path}" for path in all_weights_files(self.path))]

    def _save_last_weights(self, state: dict[str, Tensor], progress: Progress) -> None:
        try:
            self._weights.write(state, progress)
        except CheckpointError as error:
            raise RunFailed(f"{error}; {RESUME_HINT}") from error

    def __enter__(self) -> RunFolder:
        self._write_status("running")
        return self

    @contextmanager
    def renew_status(self, renewal: StatusRenewal, steps: Callable[[], int]) -> Iterator[None]:
        """Let RUN/status be renewed with the optimizer steps done, until the end of the block.

        Args:
            renewal: the thread that renews it, started on rank 0 only.
            steps: returns the optimizer steps done.
        """
        renewal.renew = lambda: self._write_status("running", at=(steps(), time.time()))
        try:
            yield
        finally:
            renewal.stop()

    @property
    def newest_step(self) -> int | None:
        """Step of the newest checkpoint; None: there is none."""
        return (self._writer.newest or self._resumption.newest or self._resumed).step or None

    @property
    def saved_at(self) -> float | None:
        """Time of the newest checkpoint of this start by `time.monotonic`; None: none has been written."""
        return self._writer.saved_at

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()
        if self._local is not None and (kind is None or issubclass(kind, Preempted)):
            self._local.remove()
        for message in self.save_errors():
            print(f"warning: {printable(message)}", file=sys.stderr, flush=True)
        if kind is None:
            if not self._write_status("finished"):
                print(f"warning: {self.path / STATUS_NAME} could not be written; the run is finished", file=sys.stderr)
        elif issubclass(kind, Preempted):
            self._write_status("preempted", str(error))
        else:
            self._write_failure(kind, error)

    def _write_failure(self, kind: type[BaseException], error: BaseException | None) -> None:
        found = read_content(self.path)
        if found is None or found.status == "running":
            invalid_input = isinstance(error, UserError) and error.exit_code == UserError.exit_code
            self._write_status("refused" if invalid_input else "failed", f"{kind.__name__}: {error}")
        elif found.step is None:  # another rank has written why the run failed, but not the checkpoint's step
            self._write_status(found.status, found.reason, found.nodes or ())

    def _write_status(
        self, status: Status, reason: str = "", nodes: Sequence[str] = (), at: tuple[int, float] | None = None
    ) -> bool:
        if not self._engine.world.is_main:
            return True
        saved = self._writer.saved or self._resumption.newest or self._resumed
        best = (saved.best, saved.best_of) if saved.best_of else None
        return write_status(self.path, status, step=saved.step, reason=reason, nodes=nodes, best=best, at=at)

    def _write_description(self) -> None:
        """Write recipe.json and classes.json."""
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
            "origins": asdict(self._origins),
        }
        classes = self._feed.class_list.dumps() + "\n"
        try:
            durable_write(self.path / RECIPE_NAME, (json.dumps(redacted(description), indent=1) + "\n").encode())
            durable_write(self.path / CLASSES_NAME, classes.encode())
        except OSError as error:
            raise unwritable(self.path, error) from error

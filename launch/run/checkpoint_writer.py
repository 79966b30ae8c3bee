"""Write checkpoints in a background thread, so that training does not wait for the disk."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from launch.run.checkpoint import CheckpointError, Fingerprint
from launch.run.checkpoint_folder import CheckpointFolder
from launch.run.progress import Progress
from launch.run.weights_files import WeightsFiles
from shards.errors import UserError

MAX_FAILURES = 3
"""Consecutive failed saves after which the run ends. Short outages are tolerated, but training for hours without
checkpoints would risk that work."""


class BackgroundWriter:
    """Saves checkpoints and weights files in a background thread, one at a time.

    If a save fails, for example because the disk is full, the run continues and earlier checkpoints are unchanged;
    `errors` returns the message.

    Args:
        on_saved: called in the thread with each checkpoint that was written.
    """

    def __init__(
        self, folder: CheckpointFolder, weights: WeightsFiles, *, on_saved: Callable[[Path], object] = lambda path: None
    ) -> None:
        self._folder, self._weights, self._on_saved = folder, weights, on_saved
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-writer")
        self._pending: tuple[Future[Any], Progress | None] | None = None
        self._errors: list[str] = []
        self.failures = 0
        """Number of consecutive failed saves, up to the last save."""
        self.saved: Progress | None = None
        """Progress in the last checkpoint that was written; None: no checkpoint has been written yet."""
        self.saved_at: float | None = None
        """Time of the last checkpoint that was written, by `time.monotonic`."""
        self.reason = ""
        """Error message of the last failed save."""
        self.weights_step: int | None = None
        """Step of the weights files, if those of the last checkpoint were written."""

    def save(self, state: dict[str, Tensor], progress: Progress, fingerprint: Fingerprint) -> None:
        """Start to write a checkpoint after the previous save. `state` must not change before `wait` has returned."""
        self.wait()
        self._pending = self._pool.submit(self._save, state, progress, fingerprint), progress

    def run(self, task: Callable[[], object]) -> None:
        """Start a task after the previous save, whose `CheckpointError` only gives a message."""
        self.wait()
        self._pending = self._pool.submit(task), None

    def _save(self, state: dict[str, Tensor], progress: Progress, fingerprint: Fingerprint) -> Path:
        path = self._folder.save(state, progress, fingerprint)
        self.saved_at = time.monotonic()
        self.save_weights(state, progress)
        try:
            self._on_saved(path)
        except UserError as error:
            self._errors.append(str(error))
        return path

    def save_weights(self, state: dict[str, Tensor], progress: Progress) -> None:
        """Write the weights files. If that fails, `errors` returns the message, and the checkpoint counts as saved."""
        self.weights_step = None
        try:
            self._weights.write(state, progress)
            self.weights_step = progress.step
        except CheckpointError as error:
            self._errors.append(str(error))

    def wait(self) -> bool:
        """Wait for the current save; return whether the last save succeeded."""
        pending, self._pending = self._pending, None
        if pending is not None:
            future, progress = pending
            try:
                future.result()
                if progress is not None:
                    self.failures, self.saved = 0, progress
            except CheckpointError as error:
                self._errors.append(str(error))
                if progress is not None:
                    self.failures, self.reason = self.failures + 1, str(error)
        return self.failures == 0

    @property
    def newest(self) -> Progress | None:
        """Progress in the newest checkpoint that is complete now. Any thread may read it; it does not wait."""
        pending = self._pending
        if pending is not None and pending[1] is not None and pending[0].done() and pending[0].exception() is None:
            return pending[1]
        return self.saved

    def errors(self) -> list[str]:
        """Return the errors of saves since the last call, without waiting for the current save."""
        if self._pending is not None and self._pending[0].done():
            self.wait()
        errors, self._errors = self._errors, []
        return errors

    def close(self) -> None:
        self.wait()
        self._pool.shutdown()

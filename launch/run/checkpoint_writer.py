"""Write checkpoints in a thread, so that training does not wait for the disk."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from launch.run.checkpoint import CheckpointError, Fingerprint
from launch.run.checkpoint_folder import CheckpointFolder
from launch.run.progress import Progress

MAX_FAILURES = 3
"""Consecutive failed saves after which the run ends: a short outage or a full disk may pass, but training on without
checkpoints would lose hours of work."""


class BackgroundWriter:
    """Saves checkpoints in a thread, one at a time, so that training does not wait for the disk.

    A save that fails (disk full) leaves the earlier checkpoints and the run alive; `complaints` tells.
    """

    def __init__(self, folder: CheckpointFolder) -> None:
        self._folder = folder
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-writer")
        self._pending: tuple[Future[Path], Progress] | None = None
        self._complaints: list[str] = []
        self.failures = 0
        """Number of consecutive failed saves, up to the last save."""
        self.saved: Progress | None = None
        """Of the last checkpoint that was written; None = none yet."""
        self.reason = ""
        """Reason of the last failed save."""

    def save(self, state: dict[str, Tensor], progress: Progress, fingerprint: Fingerprint) -> None:
        """Begin to write; waits for the one before. Nobody may change `state` before `wait` has returned."""
        self.wait()
        self._pending = self._pool.submit(self._folder.save, state, progress, fingerprint), progress

    def wait(self) -> bool:
        """Wait for the current save; return whether the last save succeeded."""
        pending, self._pending = self._pending, None
        if pending is not None:
            future, progress = pending
            try:
                future.result()
                self.failures, self.saved = 0, progress
            except CheckpointError as error:
                self.failures, self.reason = self.failures + 1, str(error)
                self._complaints.append(self.reason)
        return self.failures == 0

    def complaints(self) -> list[str]:
        """What went wrong since the last call. Does not wait."""
        if self._pending is not None and self._pending[0].done():
            self.wait()
        told, self._complaints = self._complaints, []
        return told

    def close(self) -> None:
        self.wait()
        self._pool.shutdown()

"""The lock of a run folder, RUN/.lock, which rank 0 holds during the run, so that only one trainer uses the folder.

Two trainers would overwrite each other's checkpoints. They are easily started by accident: a trainer that is asked to
stop still saves for a while, and so does one whose launcher is killed.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from launch.machine.world import World, broadcast_from_rank0
from launch.run.files import unwritable
from shards.errors import UserError
from shards.files.lock import LockHeld, file_lock

LOCK_NAME = ".lock"


class FolderInUse(UserError):
    """Another trainer uses the run folder."""


class FolderLock(contextlib.ExitStack):
    """The lock of a run folder, released by `close`. A killed process loses its lock (see `shards.files.lock`).

    Args:
        wait: seconds to wait for an earlier trainer, which may be saving.
    """

    def __init__(self, run: Path, *, wait: float) -> None:
        super().__init__()
        self._run, self._wait = run, wait
        self.acquired = False
        """Whether this start holds the lock; equal on all ranks."""

    def acquire(self, world: World, *, create: bool) -> None:
        """Acquire the lock, unless it has been acquired already. Collective.

        Args:
            create: create the folder if it does not exist; otherwise the lock of a missing folder is not acquired.

        Raises:
            FolderInUse: another trainer holds the lock; the message names its host and process.
            UserError: the folder cannot be written.
        """
        if not self.acquired:
            self.acquired = broadcast_from_rank0(lambda: self._acquire(create), world)

    def _acquire(self, create: bool) -> bool:
        try:
            if create:
                self._run.mkdir(parents=True, exist_ok=True)
            elif not self._run.is_dir():
                return False
            self.enter_context(file_lock(self._run / LOCK_NAME, f"run folder {self._run}", wait=self._wait))
        except LockHeld as error:
            raise FolderInUse(f"{error}, or use another run folder (--out)") from None
        except OSError as error:
            raise unwritable(self._run, error) from error
        return True

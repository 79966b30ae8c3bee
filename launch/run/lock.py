"""One trainer at a time in a run folder: rank 0 holds RUN/.lock as long as its run lives.

Two would overwrite each other's checkpoints, and it takes little to start two: `accelerate launch` with one process
does not pass signals on, so the trainer of a launcher that was ended goes on.
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
    """Another trainer works in the run folder."""


class FolderLock(contextlib.ExitStack):
    """The lock of a run folder, released by `close`. `shards.files.lock` says what a killed holder leaves.

    Args:
        wait: seconds to wait for an earlier trainer, which may be saving.
    """

    def __init__(self, run: Path, *, wait: float) -> None:
        super().__init__()
        self._run, self._wait = run, wait
        self.taken = False
        """Whether this launch has the folder to itself; known on every rank."""

    def take(self, world: World, *, make: bool) -> None:
        """Take it, if it is not taken yet. Collective.

        Args:
            make: make the folder; else there is nothing to take where it does not exist.

        Raises:
            FolderInUse: another trainer has it; names its host and process.
            UserError: the folder cannot be written.
        """
        if not self.taken:
            self.taken = broadcast_from_rank0(lambda: self._take(make), world)

    def _take(self, make: bool) -> bool:
        try:
            if make:
                self._run.mkdir(parents=True, exist_ok=True)
            elif not self._run.is_dir():
                return False
            self.enter_context(file_lock(self._run / LOCK_NAME, f"run folder {self._run}", wait=self._wait))
        except LockHeld as error:
            raise FolderInUse(f"{error}, or give this run another --out") from None
        except OSError as error:
            raise unwritable(self._run, error) from error
        return True

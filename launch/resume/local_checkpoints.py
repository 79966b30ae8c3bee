"""Checkpoints in the memory or on the disk of rank 0's host, from which a run restarts there after a failure.

They are more frequent than the checkpoints in the run folder, which are on storage that all hosts share, and are lost
with the host. Each follows a checkpoint in the run folder: they are in a folder whose name is a hash of it, so that
they do not match any more after another host has continued the run, or after the run has returned to a checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

import fat
from launch.machine.world import World, broadcast_from_rank0
from launch.run.checkpoint import STATE, Checkpoint, CheckpointError, Fingerprint, read_meta
from launch.run.checkpoint_folder import CheckpointFolder
from launch.run.files import unwritable
from launch.run.metrics_file import append_missing
from launch.run.origin import ORIGIN_NAME
from launch.run.progress import Progress
from shards.errors import UserError, about_file
from shards.files.durable import durable_write
from shards.files.private_folder import create_private_folder

_REMEDY = "use another --local-checkpoint-dir"
_METRICS = ".metrics.jsonl"  # after the number of steps done: lines that belong to the checkpoint of this step


class LocalCheckpoints:
    """The local checkpoints of a run. Used on rank 0.

    Args:
        root: folder on this host, such as /dev/shm.
        run: run folder.
        info: description of the model, for the header of every state.
    """

    def __init__(self, root: Path, run: Path, *, info: fat.WeightsInfo | None = None) -> None:
        self._run, self._info = run.absolute(), info
        self._user = root / f"fat-checkpoints-{os.geteuid()}"
        self._of_run = self._user / xxhash.xxh3_64_hexdigest(os.fsencode(self._run))
        self._folder: CheckpointFolder | None = None

    def attach_to(self, checkpoint: Path, *, new: bool = False) -> None:
        """Let local checkpoints follow a checkpoint of the run folder; remove those that follow another one.

        Args:
            new: this start has just written the checkpoint or returned to it, so that none of its local checkpoints
                can follow it yet. Those from before a second return to the same checkpoint are removed.

        Raises:
            UserError: the checkpoint cannot be read, or the local folder cannot be used.
        """
        self._folder = None
        folder = self._of_run / self._key(checkpoint)
        try:
            create_private_folder(self._user, remedy=_REMEDY)
            for other in self._of_run.iterdir() if self._of_run.is_dir() else ():
                if new or other != folder:
                    shutil.rmtree(other, ignore_errors=True)
        except OSError as error:
            raise UserError(f"--local-checkpoint-dir {about_file(self._user, error)}; {_REMEDY}") from error
        self._folder = CheckpointFolder(folder, keep=1, info=self._info)

    def _key(self, checkpoint: Path) -> str:
        step = int(checkpoint.name.removeprefix("step-"))
        found = xxhash.xxh3_64(read_meta(checkpoint, step).files[STATE].xxh3.encode())
        with contextlib.suppress(OSError):  # it changes when the run returns to a checkpoint
            found.update((self._run / ORIGIN_NAME).read_bytes())
        return f"after-{step:08d}-{found.hexdigest()}"

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """Return the newest undamaged local checkpoint, and a message for each damaged one."""
        if self._folder is None:
            return None, []
        try:
            self._folder.prepare()
            return self._folder.newest()
        except UserError as error:
            return None, [str(error)]

    def save(
        self, state: dict[str, Tensor], progress: Progress, fingerprint: Fingerprint, *, metrics: bytes = b""
    ) -> None:
        """Write a local checkpoint, and remove older ones.

        Args:
            metrics: lines of metrics.jsonl that could not be written so far, for example because the disk is full. They
                are kept with the checkpoint, because a run that resumes from it does not write them again.

        Raises:
            CheckpointError: it cannot be written.
        """
        if self._folder is None:
            raise CheckpointError(
                f"{self._user}: the local checkpoint of step {progress.step} is not written; local checkpoints begin "
                "again after the next checkpoint in the run folder"
            )
        folder, name = self._folder.folder, f"{progress.step}{_METRICS}"
        try:
            if metrics:
                folder.mkdir(parents=True, exist_ok=True)
                durable_write(folder / name, metrics)
        except OSError as error:
            raise CheckpointError(f"{folder}: local checkpoint not written ({error.strerror})") from error
        self._folder.save(state, progress, fingerprint)
        for other in folder.glob(f"*{_METRICS}"):
            if other.name != name:
                with contextlib.suppress(OSError):
                    other.unlink()

    def complete_metrics(self, checkpoint: Checkpoint) -> None:
        """Write the lines of metrics.jsonl that were kept with a checkpoint. Does nothing if it is not a local one.

        Raises:
            UserError: metrics.jsonl cannot be written.
        """
        try:
            lines = (checkpoint.path.parent / f"{checkpoint.progress.step}{_METRICS}").read_bytes()
        except OSError:
            return  # all had been written
        try:
            append_missing(self._run, lines)
        except OSError as error:
            raise unwritable(self._run, error) from error

    def remove(self) -> None:
        """Remove all local checkpoints of this run, if `attach_to` has checked their folder."""
        if self._folder is not None:
            shutil.rmtree(self._of_run, ignore_errors=True)
        self._folder = None


def load_on_rank0(checkpoint: Checkpoint, world: World) -> dict[str, Tensor]:
    """Load a checkpoint that only rank 0 can read, and send it to the other ranks. Collective.

    Returns:
        The state, as float32 tensors on the CPU.

    Raises:
        CheckpointError, StorageFailed: see `Checkpoint.load`.
    """
    own: list[bytearray] = []
    broadcast_from_rank0(lambda: own.append(checkpoint.read()), world)  # an error of rank 0 is raised on all ranks
    content = own[0] if world.is_main else bytearray(checkpoint.state.bytes)
    if world.size > 1:
        on_host = torch.frombuffer(content, dtype=torch.uint8)
        on_device = on_host.to(world.device)
        dist.broadcast(on_device, 0)
        on_host.copy_(on_device)
    return checkpoint.tensors_of(content)

"""Checkpoints: complete or absent, never half; independent of world size and ZeRO stage.

A checkpoint is a folder `step-00001234/` with `state.safetensors` (what `Engine.state_dict` gave) and `meta.json`
(counters, position, best metric, clock, the state file's hash). It is written under a temporary name, fsynced and
renamed, so a folder of that name is whole unless the disk damaged it, which the hash shows.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from shards.errors import UserError

_NAME = re.compile(r"step-(\d{8})")
_CHUNK = 1 << 22
_REPLACED = ".replaced"
VERSION = 1


class CheckpointError(UserError):
    """A run folder that cannot be resumed from or written to."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands; saved with every checkpoint."""

    step: int = 0
    """Optimiser steps done."""
    epoch: int = 0
    epoch_step: int = 0
    """Position in the plan: steps done of `epoch`."""
    best: float = 0.0
    """Best top-1 so far (share)."""
    is_best: bool = False
    """Whether it was reached here."""
    pending_evaluation: bool = False
    """Whether the evaluation due at this step was broken off."""
    seconds: float = 0.0
    """Time trained, over all restarts."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    path: Path
    progress: Progress
    fingerprint: dict[str, Any]
    """What must not change between save and resume (global batch, seed, data set, ...)."""

    def load(self) -> dict[str, Tensor]:
        """The state, float32 on the CPU."""
        return load_file(self.path / "state.safetensors")


class BackgroundWriter:
    """Saves checkpoints in a thread, one at a time, so that training does not wait for the disk.

    A save that fails (disk full) leaves the earlier checkpoints and the run alive; `complaints` tells.
    """

    def __init__(self, folder: CheckpointFolder) -> None:
        self._folder = folder
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-writer")
        self._pending: Future[Path] | None = None
        self._complaints: list[str] = []

    def save(self, state: dict[str, Tensor], progress: Progress, fingerprint: dict[str, Any]) -> None:
        """Begin to write; waits for the one before. Nobody may change `state` before `wait` has returned."""
        self.wait()
        self._pending = self._pool.submit(self._folder.save, state, progress, fingerprint)

    def wait(self) -> bool:
        """Wait for the save under way; False if it failed."""
        pending, self._pending = self._pending, None
        try:
            if pending is not None:
                pending.result()
        except CheckpointError as error:
            self._complaints.append(str(error))
            return False
        return True

    def complaints(self) -> list[str]:
        """What went wrong since the last call. Does not wait."""
        if self._pending is not None and self._pending.done():
            self.wait()
        told, self._complaints = self._complaints, []
        return told

    def close(self) -> None:
        self.wait()
        self._pool.shutdown()


class CheckpointFolder:
    """The checkpoints of one run.

    Args:
        folder: RUN/checkpoints.
        keep: how many of the newest to keep, besides the best.
    """

    def __init__(self, folder: Path, *, keep: int = 3) -> None:
        self.folder = folder
        self.keep = keep

    def save(self, state: dict[str, Tensor], progress: Progress, fingerprint: dict[str, Any]) -> Path:
        """Write one checkpoint, then drop old ones.

        Raises:
            CheckpointError: the folder cannot be written; earlier checkpoints are untouched.
        """
        final = self.folder / f"step-{progress.step:08d}"
        temporary = self.folder / f".{final.name}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            save_file(state, temporary / "state.safetensors")
            meta = {
                "version": VERSION,
                "progress": asdict(progress),
                "fingerprint": fingerprint,
                "state_hash": _hash(temporary / "state.safetensors"),
            }
            (temporary / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
            for path in (temporary / "state.safetensors", temporary / "meta.json", temporary):
                _fsync(path)
            replaced = self.folder / f".{final.name}{_REPLACED}"
            if final.exists():  # the same step again: there must be a whole one at every moment
                shutil.rmtree(replaced, ignore_errors=True)
                final.rename(replaced)
            temporary.rename(final)
            _fsync(self.folder)
            shutil.rmtree(replaced, ignore_errors=True)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(f"{final}: checkpoint not written ({error})") from error
        self._drop_old(final)
        return final

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest whole checkpoint, and one line for each damaged one passed over on the way to it."""
        complaints: list[str] = []
        for path in self.folder.glob(f".step-*{_REPLACED}"):  # killed between two renames
            final = self.folder / path.name.removeprefix(".").removesuffix(_REPLACED)
            if not final.exists():
                path.rename(final)
        for path in reversed(self._folders()):
            try:
                return self._open(path), complaints
            except CheckpointError as error:
                complaints.append(str(error))
        return None, complaints

    def _open(self, path: Path) -> Checkpoint:
        try:
            meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
            if meta["version"] != VERSION:
                raise CheckpointError(f"{path}: checkpoint version {meta['version']}, this tool reads {VERSION}")
            if _hash(path / "state.safetensors") != meta["state_hash"]:
                raise CheckpointError(f"{path}: damaged (state.safetensors does not match its hash); passed over")
            return Checkpoint(path, Progress(**meta["progress"]), meta["fingerprint"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: damaged ({error}); passed over") from error

    def _folders(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if _NAME.fullmatch(path.name))

    def set_aside(self) -> Path | None:
        """Move all checkpoints out of the way of a run that starts afresh; where to, if there were any."""
        if not self._folders():
            return None
        number = 1
        while (target := self.folder.with_name(f"{self.folder.name}-before-{number}")).exists():
            number += 1
        self.folder.rename(target)
        return target

    def _drop_old(self, saved: Path) -> None:
        # Newer ones can only be damaged (a whole one would have been resumed from): they take no good one's place.
        folders = [path for path in self._folders() if path.name <= saved.name]
        best = [path for path in folders if self._is_best(path)][-1:]
        for path in folders[: -self.keep]:
            if path not in best:
                shutil.rmtree(path, ignore_errors=True)

    @staticmethod
    def _is_best(path: Path) -> bool:
        try:
            return bool(json.loads((path / "meta.json").read_text(encoding="utf-8"))["progress"]["is_best"])
        except (OSError, ValueError, KeyError):
            return False


def _hash(path: Path) -> str:
    digest = xxhash.xxh3_64()
    with path.open("rb") as f:
        while chunk := f.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

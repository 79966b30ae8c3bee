"""The checkpoints of one run: saving, choosing the newest or best, and removing old ones."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

import fat
from launch.run.checkpoint import (
    META,
    NAME,
    STATE,
    VERSION,
    Checkpoint,
    CheckpointError,
    DamagedCheckpoint,
    FileEntry,
    Fingerprint,
    Meta,
    hash_file,
    read_checkpoint,
    read_meta,
    render_meta,
)
from launch.run.files import check_writable, unwritable
from launch.run.progress import Progress
from shards.errors import UserError, storage_error
from shards.files.durable import sync_folder

# Of a save under way, and of a checkpoint that is being replaced by another of the same step.
UNFINISHED = re.compile(r"\.(step-[0-9]{8,})\.[0-9a-f]{8}\.(tmp|replaced)")


class Entry(NamedTuple):
    """A name in the folder that may be a checkpoint. Ordered by step; one that was being replaced comes first."""

    step: int
    in_place: bool
    path: Path


class CheckpointFolder:
    """The checkpoints of one run. Only folders with the names and files of checkpoints are moved or removed.

    Args:
        folder: RUN/checkpoints.
        keep: how many of the newest to keep, besides the best.
        info: what the header of every state says of the model.
    """

    def __init__(self, folder: Path, *, keep: int = 3, info: fat.WeightsInfo | None = None) -> None:
        self.folder = folder
        self.keep = keep
        self._header = {} if info is None else info.to_header()
        self._damaged: set[Path] = set()

    def prepare(self) -> None:
        """Remove what a killed trainer left, and check that checkpoints can be written.

        The caller holds the lock of the run folder.

        Raises:
            UserError: the folder cannot be written.
        """
        try:
            self._make()
            for path, of, kind in self._unfinished():
                if kind == "tmp":
                    _remove(path)
                elif not os.path.lexists(self.folder / of):  # killed between two renames
                    path.rename(self.folder / of)
            check_writable(self.folder)
        except OSError as error:
            raise unwritable(self.folder, error) from error

    def save(self, state: dict[str, Tensor], progress: Progress, fingerprint: Fingerprint) -> Path:
        """Write one checkpoint, then drop old ones.

        Raises:
            CheckpointError: the folder cannot be written; earlier checkpoints are untouched.
        """
        final = self.folder / f"step-{progress.step:08d}"
        temporary, replaced = _beside(final, "tmp"), _beside(final, "replaced")
        try:
            self._make()
            temporary.mkdir()
            safetensors.torch.save_file(state, temporary / STATE, self._header)
            size, digest = hash_file(temporary / STATE)
            meta = Meta(VERSION, progress, fingerprint, {STATE: FileEntry(size, digest)})
            (temporary / META).write_bytes(render_meta(asdict(meta)).encode())
            # safetensors creates files with mode 0600, whatever the umask is.
            os.chmod(temporary / STATE, os.stat(temporary / META).st_mode & 0o777)
            for path in (temporary / STATE, temporary / META, temporary):
                sync_folder(path)
            if os.path.lexists(final):  # the same step again: a complete one must exist at all times
                if final.is_symlink() or not final.is_dir():
                    raise FileExistsError("another file has this name; move it away")
                final.rename(replaced)
            temporary.rename(final)
            sync_folder(self.folder)
        except (OSError, SafetensorError) as error:
            fact = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise CheckpointError(f"{final}: checkpoint not written ({fact})") from error
        finally:  # after an error of any kind
            shutil.rmtree(temporary, ignore_errors=True)
            with contextlib.suppress(OSError):
                if not os.path.lexists(final):
                    replaced.rename(final)
        self._damaged.discard(final)
        with contextlib.suppress(OSError, UserError):  # removing old checkpoints is not essential
            self._drop_old(progress.step)
        return final

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """Return the newest undamaged checkpoint, and one line for each damaged one that was skipped.

        Raises:
            StorageFailed: the folder or a checkpoint cannot be read (permissions, I/O error), so it may be whole.
            CheckpointError: the newest was written by another version.
        """
        complaints: list[str] = []
        for entry in reversed(self._entries()):
            try:
                return read_checkpoint(entry.path, entry.step), complaints
            except DamagedCheckpoint as error:
                complaints.append(str(error))
                self._damaged.add(entry.path)
        return None, complaints

    def best(self) -> Path | None:
        """Return the newest checkpoint that was the best when it was saved; None = none is known.

        Raises:
            StorageFailed: the folder cannot be read.
        """
        for entry in reversed(self._entries()):
            with contextlib.suppress(UserError):
                if entry.in_place and read_meta(entry.path, entry.step).progress.is_best:
                    return entry.path
        return None

    def is_empty(self) -> bool:
        """Whether there is nothing to resume from, not even a damaged checkpoint.

        Raises:
            StorageFailed: the folder cannot be read.
        """
        return not self._entries()

    def set_aside(self) -> Path | None:
        """Move all checkpoints aside for a run that starts from the beginning; return their new folder, if any.

        Raises:
            UserError: the folder cannot be written.
        """
        if self.is_empty():
            return None
        number = 1
        while os.path.lexists(target := self.folder.with_name(f"{self.folder.name}-before-{number}")):
            number += 1
        try:
            self.folder.rename(target)  # in one step, so that the new run cannot find some of them
            self._make()
            for name in os.listdir(target):
                if not (NAME.fullmatch(name) or UNFINISHED.fullmatch(name)):
                    (target / name).rename(self.folder / name)
        except OSError as error:
            raise unwritable(self.folder, error) from error
        return target

    def _make(self) -> None:
        if not self.folder.is_dir():
            self.folder.mkdir(parents=True)
            sync_folder(self.folder.parent)

    def newest_step(self) -> int | None:
        """Return the step in the newest checkpoint's name, whole or damaged; None where there is none to be seen."""
        try:
            return max((entry.step for entry in self._entries()), default=None)
        except UserError:
            return None

    def _entries(self) -> list[Entry]:
        """What may be a checkpoint, oldest first; read only, so that others may look while a trainer works."""
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise storage_error(self.folder, error, "move it away, or use another run folder (--out)") from error
        entries = []
        for name in names:
            unfinished = UNFINISHED.fullmatch(name)
            if found := NAME.fullmatch(name):
                entries.append(Entry(int(found[1]), True, self.folder / name))
            elif unfinished and unfinished[2] == "replaced":  # killed while it was replaced
                entries.append(Entry(int(unfinished[1].removeprefix("step-")), False, self.folder / name))
        return sorted(entries)

    def _unfinished(self) -> Iterator[tuple[Path, str, str]]:
        """(path, name of the checkpoint, tmp or replaced) of what a killed trainer left."""
        for name in os.listdir(self.folder):
            if found := UNFINISHED.fullmatch(name):
                yield self.folder / name, found[1], found[2]

    def _drop_old(self, saved_step: int) -> None:
        for path, _, kind in self._unfinished():
            if kind == "replaced":
                _remove(path)
        # Newer ones can only be damaged (a whole one would have been resumed from): they take no good one's place.
        entries = [entry for entry in self._entries() if entry.in_place and entry.step <= saved_step]
        whole, best, unread = [], [], []
        for entry in entries:
            try:
                meta = read_meta(entry.path, entry.step)  # not the state: hashing all of them takes too long
            except DamagedCheckpoint:
                continue
            except UserError:
                unread.append(entry)  # may be the best
                continue
            if entry.path not in self._damaged:
                whole.append(entry)
                best += [entry] if meta.progress.is_best else []
        newest = whole[-self.keep :]
        kept = {*newest, *best[-1:], *unread}
        for entry in entries:
            if newest and entry < newest[0] and entry not in kept:
                _remove(entry.path)


def _beside(final: Path, kind: str) -> Path:
    return final.with_name(f".{final.name}.{secrets.token_hex(4)}.{kind}")


def _remove(path: Path) -> None:
    """Remove a complete or partial checkpoint; keep a symlink, and a folder with files of other names."""
    if path.is_symlink() or not path.is_dir():
        return
    unfinished = UNFINISHED.fullmatch(path.name)
    # safetensors has temporary files of its own in the folder that it writes to.
    if not (unfinished and unfinished[2] == "tmp"):
        if not set(os.listdir(path)) <= {META, STATE}:
            return
        going = _beside(path.with_name(unfinished[1] if unfinished else path.name), "tmp")
        path.rename(going)  # if this is killed, no partial checkpoint must keep its name
        path = going
    shutil.rmtree(path, ignore_errors=True)

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

CHECKPOINTS = "checkpoints"
"""Name of the folder of checkpoints in a run folder."""
# Name of a checkpoint while it is written (tmp), or while a new checkpoint of the same step replaces it (replaced).
UNFINISHED = re.compile(r"\.(step-[0-9]{8,})\.[0-9a-f]{8}\.(tmp|replaced)")


class Entry(NamedTuple):
    """A folder that may be a checkpoint. Sorted by step; a checkpoint that was being replaced precedes its
    successor."""

    step: int
    in_place: bool
    path: Path


class CheckpointFolder:
    """The checkpoints of one run. Only folders with the names and files of checkpoints are moved or removed.

    Args:
        folder: RUN/checkpoints.
        keep: number of newest checkpoints to keep, in addition to the best.
        info: description of the model, for the header of every state.
    """

    def __init__(self, folder: Path, *, keep: int = 3, info: fat.WeightsInfo | None = None) -> None:
        self.folder = folder
        self.keep = keep
        self._header = {} if info is None else info.to_header()
        self._damaged: set[Path] = set()

    def prepare(self) -> None:
        """Remove or restore unfinished checkpoints of a killed trainer, and check that checkpoints can be written.

        The caller must hold the lock of the run folder.

        Raises:
            UserError: the folder cannot be written.
        """
        try:
            self._create()
            for path, name, kind in self._unfinished():
                if kind == "tmp":
                    _remove(path)
                elif not os.path.lexists(self.folder / name):  # the trainer was killed between the renames of `save`
                    path.rename(self.folder / name)
            check_writable(self.folder)
        except OSError as error:
            raise unwritable(self.folder, error) from error

    def save(self, state: dict[str, Tensor], progress: Progress, fingerprint: Fingerprint) -> Path:
        """Write a checkpoint, then remove old ones.

        Raises:
            CheckpointError: the folder cannot be written; earlier checkpoints are unchanged.
        """
        final = self.folder / f"step-{progress.step:08d}"
        temporary, replaced = _unfinished_path(final, "tmp"), _unfinished_path(final, "replaced")
        try:
            self._create()
            temporary.mkdir()
            safetensors.torch.save_file(state, temporary / STATE, self._header)
            size, digest = hash_file(temporary / STATE)
            meta = Meta(VERSION, progress, fingerprint, {STATE: FileEntry(size, digest)})
            (temporary / META).write_bytes(render_meta(asdict(meta)).encode())
            # safetensors ignores the umask and creates files with mode 0600.
            os.chmod(temporary / STATE, os.stat(temporary / META).st_mode & 0o777)
            for path in (temporary / STATE, temporary / META, temporary):
                sync_folder(path)
            if os.path.lexists(final):  # a checkpoint of this step exists, and stays until the new one is complete
                if final.is_symlink() or not final.is_dir():
                    raise FileExistsError("another file has this name; move it away")
                final.rename(replaced)
            temporary.rename(final)
            sync_folder(self.folder)
        except (OSError, SafetensorError) as error:
            fact = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise CheckpointError(f"{final}: checkpoint not written ({fact})") from error
        finally:  # executed also after errors that are not caught above
            shutil.rmtree(temporary, ignore_errors=True)
            with contextlib.suppress(OSError):
                if not os.path.lexists(final):
                    replaced.rename(final)
        self._damaged.discard(final)
        with contextlib.suppress(OSError, UserError):  # failing to remove old checkpoints must not fail the save
            self._remove_old(progress.step)
        return final

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """Return the newest undamaged checkpoint, and a message for each damaged one that was skipped.

        Raises:
            StorageFailed: the folder or a checkpoint cannot be read (permissions, I/O error); it may be undamaged.
            CheckpointError: the newest checkpoint was written in another version of the format.
        """
        skipped: list[str] = []
        for entry in reversed(self._entries()):
            try:
                return read_checkpoint(entry.path, entry.step), skipped
            except DamagedCheckpoint as error:
                skipped.append(f"{error}; skipped")
                self._damaged.add(entry.path)
        return None, skipped

    def newest_described(self) -> Path | None:
        """Return the folder of the newest checkpoint whose meta.json is undamaged, even if its state is damaged.

        Raises:
            StorageFailed, CheckpointError: see `newest`.
        """
        for entry in reversed(self._entries()):
            if entry.in_place:
                with contextlib.suppress(DamagedCheckpoint):
                    read_meta(entry.path, entry.step)
                    return entry.path
        return None

    def is_empty(self) -> bool:
        """Return whether the folder has no checkpoints, damaged ones included.

        Raises:
            StorageFailed: the folder cannot be read.
        """
        return not self._entries()

    def archive(self, *, even_if_empty: bool = False) -> Path | None:
        """Move all checkpoints to RUN/checkpoints-before-N; return that folder, or None if there are no checkpoints.

        Args:
            even_if_empty: create and return RUN/checkpoints-before-N also if there are no checkpoints.

        Raises:
            UserError: the folder cannot be written.
        """
        if self.is_empty() and not even_if_empty:
            return None
        target = self.folder.with_name(self.next_archive())
        try:
            self.folder.rename(target)  # atomic, so that a new run never finds only some of the old checkpoints
            self._create()
            for name in os.listdir(target):
                if not (NAME.fullmatch(name) or UNFINISHED.fullmatch(name)):
                    (target / name).rename(self.folder / name)
        except OSError as error:
            raise unwritable(self.folder, error) from error
        return target

    def next_archive(self) -> str:
        """Return the first unused name checkpoints-before-N in the run folder."""
        number = 1
        while os.path.lexists(self.folder.with_name(name := f"{self.folder.name}-before-{number}")):
            number += 1
        return name

    def paths(self) -> dict[int, Path]:
        """Return the paths of all checkpoints, damaged ones included, by step in ascending order.

        Raises:
            StorageFailed: the folder cannot be read.
        """
        return {entry.step: entry.path for entry in self._entries()}

    def readable(self, *, last: int | None = None) -> tuple[list[Meta], list[str]]:
        """Return the metadata of checkpoints in ascending order, and a message for each whose metadata is damaged.

        Args:
            last: last step to include; None: all.

        Raises:
            StorageFailed: the folder or a file cannot be read.
            CheckpointError: a checkpoint was written in another version of the format.
        """
        found, damaged = [], []
        for step, path in self.paths().items():
            if last is None or step <= last:
                try:
                    found.append(read_meta(path, step))
                except DamagedCheckpoint as error:
                    damaged.append(f"{error}; skipped")
        return found, damaged

    def set_aside(self, archive: Path, *, after: int) -> list[int]:
        """Move the checkpoints of steps after `after` to the folder `archive`; return their steps in ascending order.

        Raises:
            OSError: a folder cannot be written.
        """
        later = [entry for entry in self._entries() if entry.step > after]
        for entry in reversed(later):
            entry.path.rename(archive / entry.path.name)
        return sorted({entry.step for entry in later})

    def _create(self) -> None:
        if not self.folder.is_dir():
            self.folder.mkdir(parents=True)
            sync_folder(self.folder.parent)

    def newest_step(self) -> int | None:
        """Return the step of the newest checkpoint, even if it is damaged; None if none exists or can be listed."""
        try:
            return max((entry.step for entry in self._entries()), default=None)
        except UserError:
            return None

    def _entries(self) -> list[Entry]:
        """Return the folders that may be checkpoints, oldest first. Changes nothing, so that it is safe during
        training."""
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
            elif unfinished and unfinished[2] == "replaced":  # the trainer was killed while it replaced this checkpoint
                entries.append(Entry(int(unfinished[1].removeprefix("step-")), False, self.folder / name))
        return sorted(entries)

    def _unfinished(self) -> Iterator[tuple[Path, str, str]]:
        """Yield path, checkpoint name and kind (tmp or replaced) of unfinished checkpoints."""
        for name in os.listdir(self.folder):
            if found := UNFINISHED.fullmatch(name):
                yield self.folder / name, found[1], found[2]

    def _remove_old(self, saved_step: int) -> None:
        for path, _, kind in self._unfinished():
            if kind == "replaced":
                _remove(path)
        # Checkpoints of steps after `saved_step` must be damaged, or the run would have resumed from them. They do not
        # count toward `keep`.
        entries = [entry for entry in self._entries() if entry.in_place and entry.step <= saved_step]
        complete, best, unreadable = [], [], []
        for entry in entries:
            try:
                meta = read_meta(entry.path, entry.step)  # the state is not read, because hashing it takes too long
            except DamagedCheckpoint:
                continue
            except UserError:
                unreadable.append(entry)  # keep it, because it may be the best checkpoint
                continue
            if entry.path not in self._damaged:
                complete.append(entry)
                best += [entry] if meta.progress.is_best else []
        newest = complete[-self.keep :]
        kept = {*newest, *best[-1:], *unreadable}
        for entry in entries:
            if newest and entry < newest[0] and entry not in kept:
                _remove(entry.path)


def _unfinished_path(final: Path, kind: str) -> Path:
    return final.with_name(f".{final.name}.{secrets.token_hex(4)}.{kind}")


def _remove(path: Path) -> None:
    """Remove a complete or partial checkpoint, unless it is a symlink or contains files of other programs."""
    if path.is_symlink() or not path.is_dir():
        return
    unfinished = UNFINISHED.fullmatch(path.name)
    # A folder with kind tmp may contain temporary files of safetensors.
    if not (unfinished and unfinished[2] == "tmp"):
        if not set(os.listdir(path)) <= {META, STATE}:
            return
        temporary = _unfinished_path(path.with_name(unfinished[1] if unfinished else path.name), "tmp")
        path.rename(temporary)  # so that an interrupted removal leaves no partial checkpoint with a valid name
        path = temporary
    shutil.rmtree(path, ignore_errors=True)

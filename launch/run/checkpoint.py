"""Checkpoints: complete or absent, never half; independent of world size and ZeRO stage.

A checkpoint is a folder `step-00001234/` with `state.safetensors` (what `Engine.state_dict` gave; its header says for
which model and classes, as that of a weights file does) and `meta.json`
(counters, position, best metric, clock, the run's fingerprint, size and hash of every other file, and the hash of all
this). It is written under a temporary name, fsynced and renamed, so a folder of that name is whole unless it was
damaged later, which the hashes show.

Damaged checkpoints are skipped. Checkpoints that cannot be read (permissions, I/O errors) end the start, because they
may be undamaged.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, get_args

import safetensors.torch
import xxhash
from pydantic import Field, TypeAdapter
from safetensors import SafetensorError
from torch import Tensor

import fat
from launch.run.files import check_writable, open_regular, read_regular, unwritable
from pipeline.plan import Position
from shards.errors import StorageFailed, UserError, storage_error
from shards.files.durable import sync_folder
from shards.schema import Count, Digest, FileName, parse_json

META, STATE = "meta.json", "state.safetensors"
VERSION = 1
MAX_FAILURES = 3
"""Consecutive failed saves after which the run ends: a short outage or a full disk may pass, but training on without
checkpoints would lose hours of work."""

_NAME = re.compile(r"step-([0-9]{8,})")
# Of a save under way, and of a checkpoint that is being replaced by another of the same step.
_UNFINISHED = re.compile(r"\.(step-[0-9]{8,})\.[0-9a-f]{8}\.(tmp|replaced)")
_CHUNK = 1 << 22
_META_LIMIT = 1 << 20

Scored = Literal["weights", "average"]
"""What an evaluation is of: the weights as trained, or their moving average."""
SCORED: tuple[Scored, ...] = get_args(Scored)
Scalar = str | int | float | bool | None
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class CheckpointError(UserError):
    """A run folder that cannot be resumed from or written to."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint whose content is not what was written."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands; saved with every checkpoint."""

    step: Count = 0
    """Optimiser steps done."""
    epoch: Count = 0
    epoch_step: Count = 0
    """Position in the plan: steps done of `epoch`."""
    best: Share = 0.0
    """Best top-1 so far (share), of the weights or of their average."""
    best_of: Scored | None = None
    """Which of the two reached it; None = there is no best yet."""
    is_best: bool = False
    """Whether it was reached here."""
    pending_evaluation: bool = False
    """Whether the evaluation due at this step was broken off."""
    seconds: Seconds = 0.0
    """Time trained, over all restarts."""

    def after(self, step: int, position: Position) -> Progress:
        """The progress after an optimizer step.

        Args:
            step: optimizer steps done.
            position: where the plan stands then.
        """
        return replace(self, step=step, epoch=position.epoch, epoch_step=position.step, is_best=False)

    def evaluated(self, top1: Mapping[Scored, float]) -> Progress:
        """The progress after an evaluation at this step; of equally good ones, the weights are the best."""
        best_of, best = max(top1.items(), key=itemgetter(1))
        if best <= self.best:
            return replace(self, is_best=False, pending_evaluation=False)
        return replace(self, best=best, best_of=best_of, is_best=True, pending_evaluation=False)


@dataclass(frozen=True)
class Fingerprint:
    """Options that must not change between save and resume (`fixed`: global batch, seed, data set, ...), and others."""

    fixed: dict[str, Scalar]
    free: dict[str, Scalar]


@dataclass(frozen=True)
class FileEntry:
    """Size and hash of a file of a checkpoint."""

    bytes: Count
    xxh3: Digest


@dataclass(frozen=True)
class _Meta:
    """Content of meta.json without its hash."""

    version: int
    progress: Progress
    fingerprint: Fingerprint
    files: dict[FileName, FileEntry]


_OBJECT: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])
_SCHEMA = TypeAdapter(_Meta)


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    path: Path
    progress: Progress
    fingerprint: Fingerprint
    state: FileEntry

    def load(self) -> dict[str, Tensor]:
        """Read the state, float32 on the CPU; the bytes that are loaded are the ones that are hashed.

        Raises:
            StorageFailed: the file cannot be read, or is not the one that was checked when the checkpoint was chosen.
            CheckpointError: the file is missing, or what was saved is no readable state.
        """
        path = self.path / STATE
        try:
            content = read_regular(path, limit=self.state.bytes)
        except OSError as error:
            raise storage_error(
                path, error, "the run folder (--out) must be on storage that all nodes share"
            ) from error
        if len(content) != self.state.bytes or xxhash.xxh3_64_hexdigest(content) != self.state.xxh3:
            raise StorageFailed(f"{path}: has changed since it was checked; start again")
        try:
            return safetensors.torch.load(content)
        except SafetensorError as error:
            raise CheckpointError(
                f"{path}: not a readable state ({error}); remove {self.path}, then start again"
            ) from error

    def info(self) -> fat.WeightsInfo:
        """Read what the state's header says of the model: dimensions, classes, image size.

        Raises:
            CheckpointError: it is not readable.
            OSError: the file cannot be read.
        """
        try:
            return fat.read_info(self.path / STATE)
        except ValueError as error:
            raise CheckpointError(
                f"{self.path / STATE}: not a readable state ({error}); remove {self.path}, then start again"
            ) from error


def open_checkpoint(path: Path) -> Checkpoint:
    """Open one checkpoint by the path of its folder.

    Raises:
        DamagedCheckpoint: it is not what was written, or no checkpoint.
        StorageFailed: it cannot be read.
        CheckpointError: another version wrote it.
    """
    found = _NAME.fullmatch(path.absolute().name)
    if found is None:
        raise DamagedCheckpoint(f"{path}: not the name of a checkpoint (step-00001234)")
    return _open(_Entry(int(found[1]), True, path))


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


class _Entry(NamedTuple):
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
            size, digest = _hash(temporary / STATE)
            meta = _Meta(VERSION, progress, fingerprint, {STATE: FileEntry(size, digest)})
            (temporary / META).write_text(_rendered(asdict(meta)), encoding="utf-8")
            # safetensors creates files with mode 0600, whatever the umask is.
            os.chmod(temporary / STATE, os.stat(temporary / META).st_mode & 0o777)
            for path in (temporary / STATE, temporary / META, temporary):
                sync_folder(path)
            if os.path.lexists(final):  # the same step again: a complete one must exist at all times
                if final.is_symlink() or not final.is_dir():
                    raise FileExistsError(errno.EEXIST, "another file has this name; move it away")
                final.rename(replaced)
            temporary.rename(final)
            sync_folder(self.folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            with contextlib.suppress(OSError):
                if not os.path.lexists(final):
                    replaced.rename(final)
            fact = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise CheckpointError(f"{final}: checkpoint not written ({fact})") from error
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
                return _open(entry), complaints
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
                if entry.in_place and _read_meta(entry).progress.is_best:
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
                if not (_NAME.fullmatch(name) or _UNFINISHED.fullmatch(name)):
                    (target / name).rename(self.folder / name)
        except OSError as error:
            raise unwritable(self.folder, error) from error
        return target

    def _make(self) -> None:
        if not self.folder.is_dir():
            self.folder.mkdir(parents=True, exist_ok=True)
            sync_folder(self.folder.parent)

    def newest_step(self) -> int | None:
        """Return the step in the newest checkpoint's name, whole or damaged; None where there is none to be seen."""
        try:
            return max((entry.step for entry in self._entries()), default=None)
        except UserError:
            return None

    def _entries(self) -> list[_Entry]:
        """What may be a checkpoint, oldest first; read only, so that others may look while a trainer works."""
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise storage_error(self.folder, error, "move it away, or use another run folder (--out)") from error
        entries = []
        for name in names:
            unfinished = _UNFINISHED.fullmatch(name)
            if found := _NAME.fullmatch(name):
                entries.append(_Entry(int(found[1]), True, self.folder / name))
            elif unfinished and unfinished[2] == "replaced":  # killed while it was replaced
                entries.append(_Entry(int(unfinished[1].removeprefix("step-")), False, self.folder / name))
        return sorted(entries)

    def _unfinished(self) -> Iterator[tuple[Path, str, str]]:
        """(path, name of the checkpoint, tmp or replaced) of what a killed trainer left."""
        for name in os.listdir(self.folder):
            if found := _UNFINISHED.fullmatch(name):
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
                meta = _read_meta(entry)  # not the state: hashing all of them takes too long
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


def _open(entry: _Entry) -> Checkpoint:
    meta = _read_meta(entry)
    for name, file in meta.files.items():
        try:
            found = FileEntry(*_hash(entry.path / name))
        except OSError as error:
            _judge(entry.path, name, error)
        if found != file:
            raise _damaged(entry.path, f"{name} does not match its hash")
    return Checkpoint(entry.path, meta.progress, meta.fingerprint, meta.files[STATE])


def _read_meta(entry: _Entry) -> _Meta:
    """Read and check meta.json.

    Raises:
        DamagedCheckpoint: it is missing, or not what was written.
        StorageFailed: it cannot be read.
        CheckpointError: another version wrote it.
    """
    path = entry.path
    try:
        content = read_regular(path / META, limit=_META_LIMIT)
    except OSError as error:
        _judge(path, META, error)
    try:
        values = parse_json(content, _OBJECT, limit=_META_LIMIT)
        if values.pop("hash", None) != _content_hash(values):
            raise ValueError(f"{META} does not match its hash")
        if values.get("version") != VERSION:
            raise CheckpointError(
                f"{path}: checkpoint version {values.get('version')}, this tool reads {VERSION}; resume with the tool "
                "that wrote it, or use another run folder (--out)"
            )
        meta = parse_json(_canonical(values), _SCHEMA, limit=_META_LIMIT)
        if fault := _fault(meta, entry.step):
            raise ValueError(f"{META}: {fault}")
    except ValueError as error:
        raise _damaged(path, str(error)) from None
    return meta


def _fault(meta: _Meta, step: int) -> str:
    """Return the first contradiction in the metadata, or an empty string."""
    progress = meta.progress
    whole_epochs = progress.step - progress.epoch_step
    if progress.step != step:
        return f"written for step {progress.step}"
    if whole_epochs < 0 or (whole_epochs % progress.epoch if progress.epoch else whole_epochs):
        return f"step {progress.step} cannot be step {progress.epoch_step} of epoch {progress.epoch}"
    if progress.is_best and (progress.pending_evaluation or not progress.best):
        return "marked as the best without an evaluation"
    return "" if STATE in meta.files else f"no {STATE}"


def _judge(path: Path, name: str, error: OSError) -> NoReturn:
    """Raise `StorageFailed` for a file that may be whole, `DamagedCheckpoint` for one that is missing or no file."""
    judged = storage_error(path / name, error)
    if isinstance(judged, StorageFailed):
        raise judged from error
    raise _damaged(path, f"{name}: {error.strerror}") from error


def _damaged(path: Path, fact: str) -> DamagedCheckpoint:
    return DamagedCheckpoint(f"{path}: damaged ({fact}); skipped")


def _beside(final: Path, kind: str) -> Path:
    return final.with_name(f".{final.name}.{secrets.token_hex(4)}.{kind}")


def _remove(path: Path) -> None:
    """Remove a complete or partial checkpoint; keep a symlink, and a folder with files of other names."""
    if path.is_symlink() or not path.is_dir():
        return
    unfinished = _UNFINISHED.fullmatch(path.name)
    # safetensors has temporary files of its own in the folder that it writes to.
    if not (unfinished and unfinished[2] == "tmp"):
        if not set(os.listdir(path)) <= {META, STATE}:
            return
        going = _beside(path.with_name(unfinished[1] if unfinished else path.name), "tmp")
        path.rename(going)  # if this is killed, no partial checkpoint must keep its name
        path = going
    shutil.rmtree(path, ignore_errors=True)


def _rendered(values: dict[str, Any]) -> str:
    return json.dumps({**values, "hash": _content_hash(values)}, indent=1) + "\n"


def _content_hash(values: dict[str, Any]) -> str:
    """Return xxh3-64 of the values in canonical JSON."""
    return xxhash.xxh3_64_hexdigest(_canonical(values))


def _canonical(values: dict[str, Any]) -> bytes:
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()


def _hash(path: Path) -> tuple[int, str]:
    """Size and xxh3 of a regular file."""
    digest, size = xxhash.xxh3_64(), 0
    with open(open_regular(path), "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest()

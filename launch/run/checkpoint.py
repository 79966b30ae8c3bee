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

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import safetensors.torch
import xxhash
from pydantic import TypeAdapter
from safetensors import SafetensorError
from torch import Tensor

import fat
from launch.run.files import open_regular, read_regular
from launch.run.progress import Progress
from shards.errors import StorageFailed, UserError, storage_error
from shards.schema import Count, Digest, FileName, parse_json

META, STATE = "meta.json", "state.safetensors"
VERSION = 1
NAME = re.compile(r"step-([0-9]{8,})")

_CHUNK = 1 << 22
_META_LIMIT = 1 << 20

Scalar = str | int | float | bool | None


class CheckpointError(UserError):
    """A run folder that cannot be resumed from or written to."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint whose content is not what was written."""


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
class Meta:
    """Content of meta.json without its hash."""

    version: int
    progress: Progress
    fingerprint: Fingerprint
    files: dict[FileName, FileEntry]


_OBJECT: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])
_SCHEMA = TypeAdapter(Meta)


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
    found = NAME.fullmatch(path.absolute().name)
    if found is None:
        raise DamagedCheckpoint(f"{path}: not the name of a checkpoint (step-00001234)")
    return read_checkpoint(path, int(found[1]))


def read_checkpoint(path: Path, step: int) -> Checkpoint:
    """Read the checkpoint of step `step`. Raises what `open_checkpoint` does."""
    meta = read_meta(path, step)
    for name, file in meta.files.items():
        try:
            found = FileEntry(*hash_file(path / name))
        except OSError as error:
            _judge(path, name, error)
        if found != file:
            raise _damaged(path, f"{name} does not match its hash")
    return Checkpoint(path, meta.progress, meta.fingerprint, meta.files[STATE])


def read_meta(path: Path, step: int) -> Meta:
    """Read and check meta.json of the checkpoint of step `step`.

    Raises:
        DamagedCheckpoint: it is missing, or not what was written.
        StorageFailed: it cannot be read.
        CheckpointError: another version wrote it.
    """
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
        if fault := _fault(meta, step):
            raise ValueError(f"{META}: {fault}")
    except ValueError as error:
        raise _damaged(path, str(error)) from None
    return meta


def _fault(meta: Meta, step: int) -> str:
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


def render_meta(values: dict[str, Any]) -> str:
    return json.dumps({**values, "hash": _content_hash(values)}, indent=1) + "\n"


def _content_hash(values: dict[str, Any]) -> str:
    """Return xxh3-64 of the values in canonical JSON."""
    return xxhash.xxh3_64_hexdigest(_canonical(values))


def _canonical(values: dict[str, Any]) -> bytes:
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()


def hash_file(path: Path) -> tuple[int, str]:
    """Size and xxh3 of a regular file."""
    digest, size = xxhash.xxh3_64(), 0
    with open(open_regular(path), "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest()

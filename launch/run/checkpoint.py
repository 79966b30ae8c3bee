"""Format and validation of checkpoints, which are independent of world size and ZeRO stage.

A checkpoint is a folder `step-00001234/` with two files:

- `state.safetensors`: `Engine.state_dict()`. As in a weights file, the header describes the model and its classes.
- `meta.json`: step, position, best accuracy, training time, the run's fingerprint, size and hash of the state, and a
  hash of this metadata.

It is written under a temporary name, fsynced and renamed, so that a folder with this name is complete unless it is
damaged later, which the hashes detect. Damaged checkpoints are skipped. If a checkpoint cannot be read (permissions,
I/O errors), the start fails, because the checkpoint may be undamaged.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import xxhash
from pydantic import TypeAdapter
from torch import Tensor

import fat
from launch.run.files import open_regular, read_regular
from launch.run.progress import Progress
from launch.run.state_file import read_bytes, tensors_of
from shards.errors import StorageFailed, UserError, storage_error
from shards.schema import Count, Digest, FileName, parse_json

META, STATE = "meta.json", "state.safetensors"
VERSION = 1
NAME = re.compile(r"step-([0-9]{8,})")

_CHUNK = 1 << 22
_META_LIMIT = 1 << 20

Scalar = str | int | float | bool | None


class CheckpointError(UserError):
    """A checkpoint that cannot be written, or from which this run cannot resume."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint whose content differs from what was written."""


@dataclass(frozen=True)
class Fingerprint:
    """Options that must be equal when a run is resumed (`fixed`), and options that may change with a warning
    (`free`)."""

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
    """A complete, undamaged checkpoint on disk."""

    path: Path
    progress: Progress
    fingerprint: Fingerprint
    state: FileEntry

    def load(self) -> dict[str, Tensor]:
        """Read the state, as float32 tensors on the CPU. The hash of the loaded bytes is checked again.

        The tensors share the memory of the file's content, which is freed with the last of them.

        Raises:
            StorageFailed: the file cannot be read, or has changed since the checkpoint was chosen.
            CheckpointError: the file is missing, or not a safetensors file.
        """
        return self.tensors_of(self.read())

    def read(self) -> bytearray:
        """Read the file of the state, and check its hash. Raises the errors of `load`."""
        path = self.path / STATE
        try:
            content = read_bytes(path, self.state.bytes)
        except OSError as error:
            raise storage_error(
                path, error, "the run folder (--out) must be on storage that all nodes share"
            ) from error
        if len(content) != self.state.bytes or xxhash.xxh3_64_hexdigest(content) != self.state.xxh3:
            raise StorageFailed(f"{path}: has changed since it was checked; start the run again")
        return content

    def tensors_of(self, content: bytearray) -> dict[str, Tensor]:
        """Return the tensors in the content of the state's file, whose memory they use.

        Raises:
            CheckpointError: it is not a safetensors file.
        """
        try:
            return tensors_of(content)
        except ValueError as error:
            fact = f"not a valid safetensors file ({error})"
            raise CheckpointError(
                f"{self.path / STATE}: {fact}; remove {self.path}, then start the run again"
            ) from error

    def info(self) -> fat.WeightsInfo:
        """Read the header of the state: dimensions of the model, classes, image size.

        Raises:
            CheckpointError: the header is invalid.
            OSError: the file cannot be read.
        """
        try:
            return fat.read_info(self.path / STATE)
        except ValueError as error:
            raise CheckpointError(
                f"{self.path / STATE}: invalid header ({error}); remove {self.path}, then start the run again"
            ) from error


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint by the path of its folder.

    Raises:
        DamagedCheckpoint: the checkpoint is damaged, or the folder is not a checkpoint.
        StorageFailed: it cannot be read.
        CheckpointError: it was written in another version of the format.
    """
    found = NAME.fullmatch(path.absolute().name)
    if found is None:
        raise DamagedCheckpoint(f"{path}: not a checkpoint folder; expected a name like step-00001234")
    return read_checkpoint(path, int(found[1]))


def read_checkpoint(path: Path, step: int) -> Checkpoint:
    """Read and verify the checkpoint of step `step`. Raises the errors of `open_checkpoint`."""
    meta = read_meta(path, step)
    for name, file in meta.files.items():
        try:
            found = FileEntry(*hash_file(path / name))
        except OSError as error:
            _raise_read_error(path, name, error)
        if found != file:
            raise _damaged(path, f"{name} does not match its hash")
    return Checkpoint(path, meta.progress, meta.fingerprint, meta.files[STATE])


def read_meta(path: Path, step: int) -> Meta:
    """Read and validate meta.json of the checkpoint of step `step`.

    Raises:
        DamagedCheckpoint: the file is missing or damaged.
        StorageFailed: it cannot be read.
        CheckpointError: it was written in another version of the format.
    """
    try:
        content = read_regular(path / META, limit=_META_LIMIT)
    except OSError as error:
        _raise_read_error(path, META, error)
    try:
        values = parse_json(content, _OBJECT, limit=_META_LIMIT)
        if values.pop("hash", None) != _content_hash(values):
            raise ValueError(f"{META} does not match its hash")
        if values.get("version") != VERSION:
            raise CheckpointError(
                f"{path}: checkpoint version {values.get('version')}, but this program reads version {VERSION}; resume "
                "with the program that wrote it, or use another run folder (--out)"
            )
        meta = parse_json(_canonical(values), _SCHEMA, limit=_META_LIMIT)
        if contradiction := _contradiction(meta, step):
            raise ValueError(f"{META}: {contradiction}")
    except ValueError as error:
        raise _damaged(path, str(error)) from None
    return meta


def _contradiction(meta: Meta, step: int) -> str:
    """Return the first contradiction in the metadata, or an empty string."""
    progress = meta.progress
    whole_epochs = progress.step - progress.epoch_step
    if progress.step != step:
        return f"written for step {progress.step}"
    if whole_epochs < 0 or (whole_epochs % progress.epoch if progress.epoch else whole_epochs):
        return f"step {progress.step} contradicts step {progress.epoch_step} of epoch {progress.epoch}"
    if progress.is_best and (progress.pending_evaluation or not progress.best):
        return "marked as the best without an evaluation"
    if progress.top1 and progress.pending_evaluation:
        return "evaluated, but its evaluation was interrupted"
    return "" if STATE in meta.files else f"no {STATE}"


def _raise_read_error(path: Path, name: str, error: OSError) -> NoReturn:
    """Raise `DamagedCheckpoint` if a file is missing or not regular, else `StorageFailed`: it may be undamaged."""
    failure = storage_error(path / name, error)
    if isinstance(failure, StorageFailed):
        raise failure from error
    raise _damaged(path, f"{name}: {error.strerror}") from error


def _damaged(path: Path, fact: str) -> DamagedCheckpoint:
    return DamagedCheckpoint(f"{path}: damaged ({fact})")


def render_meta(values: dict[str, Any]) -> str:
    return json.dumps({**values, "hash": _content_hash(values)}, indent=1) + "\n"


def _content_hash(values: dict[str, Any]) -> str:
    """Return the xxh3-64 hash of the values in canonical JSON."""
    return xxhash.xxh3_64_hexdigest(_canonical(values))


def _canonical(values: dict[str, Any]) -> bytes:
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()


def hash_file(path: Path) -> tuple[int, str]:
    """Return size and xxh3-64 hash of a regular file."""
    digest, size = xxhash.xxh3_64(), 0
    with open(open_regular(path), "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest()

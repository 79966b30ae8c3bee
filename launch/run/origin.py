"""RUN/origin.json: the checkpoint that was chosen with `--resume step:N`, `best` or PATH, and whether this is complete.

It is written before anything is moved, so that a start that was killed meanwhile is completed by the next one. Later it
lets the same command resume the run instead of choosing that checkpoint again.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter

from launch.run.files import read_regular
from shards.errors import UserError
from shards.files.durable import durable_write
from shards.schema import Count, Digest, FileName, parse_json

ORIGIN_NAME = "origin.json"
_LIMIT = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A checkpoint from which the training of a run folder continued."""

    request: str
    """Value of `--resume`; a path is absolute."""
    checkpoint: str
    """Folder of the checkpoint. Absolute if it is that of another run, else relative to the run folder."""
    step: Count
    digest: Digest
    """xxh3-64 hash of the checkpoint's state."""
    archive: FileName | None = None
    """Folder in the run folder to which later files were moved; None: there were none."""
    complete: bool = False
    """Whether later files were moved, or the checkpoint of another run was copied."""


@dataclass(frozen=True)
class Origins:
    """Content of origin.json."""

    branch: Origin | None = None
    """Checkpoint of another run with which this run began."""
    rewind: Origin | None = None
    """Checkpoint of this run to which it returned last."""

    @property
    def pending(self) -> Origin | None:
        """What an earlier start began and did not complete."""
        return next((origin for origin in (self.rewind, self.branch) if origin and not origin.complete), None)

    def made_by(self, request: str) -> Origin | None:
        """Return what an earlier start with this value of `--resume` did, if anything."""
        return next((origin for origin in (self.rewind, self.branch) if origin and origin.request == request), None)

    def completed(self) -> Origins:
        """Return a copy in which everything is complete."""
        branch, rewind = (each and replace(each, complete=True) for each in (self.branch, self.rewind))
        return Origins(branch, rewind)


_SCHEMA = TypeAdapter(Origins)


def read_origins(run: Path) -> Origins:
    """Read RUN/origin.json; without the file, both fields are None.

    Raises:
        UserError: the file cannot be read, or is damaged.
    """
    path = run / ORIGIN_NAME
    remedy = "restore it; or remove it, and check from which step the next start resumes"
    try:
        return parse_json(read_regular(path, limit=_LIMIT), _SCHEMA, limit=_LIMIT)
    except (FileNotFoundError, NotADirectoryError):
        return Origins()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); {remedy}") from error


def write_origins(run: Path, origins: Origins) -> None:
    """Replace RUN/origin.json durably.

    Raises:
        OSError: it cannot be written.
    """
    durable_write(run / ORIGIN_NAME, (json.dumps(asdict(origins), indent=1) + "\n").encode())

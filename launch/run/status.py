"""RUN/status: a line of JSON with the status of a run, for schedulers and users."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from launch.run.files import open_regular, read_regular
from launch.run.progress import Fraction, WeightsKind
from shards.errors import UserError
from shards.files.durable import temporary_name
from shards.redact import redact
from shards.schema import Count, parse_json

STATUS_NAME = "status"
Status = Literal["running", "preempted", "stalled", "finished", "failed", "refused"]
"""preempted: stopped on request, after a checkpoint was saved. stalled: ended by the watchdog. refused: invalid input,
with which another start would fail too. `launch/slurm/train.sbatch` restarts a run that was preempted, and a limited
number of times one that is stalled, failed or running (it was killed)."""

EXIT_STATUS = 75  # exit status of a preempted run: EX_TEMPFAIL of sysexits.h, "try again later"

_LIMIT = 1 << 20


class Preempted(Exception):
    """The run has been saved and should end with `EXIT_STATUS`."""


class RunFailed(UserError):
    """The run cannot continue; another start may succeed."""

    exit_code = 1


@dataclass(frozen=True)
class StatusContent:
    status: Status
    step: Count | None
    reason: str
    nodes: list[str] | None = None
    best: Fraction | None = None
    best_of: WeightsKind | None = None


_SCHEMA = TypeAdapter(StatusContent)


def write_status(
    run: Path,
    status: Status,
    *,
    step: int | None = None,
    reason: str = "",
    nodes: Sequence[str] = (),
    best: tuple[float, str] | None = None,
) -> bool:
    """Replace RUN/status, if the run folder exists.

    Args:
        step: step of the newest checkpoint; None: not known yet.
        nodes: hosts that the next start should not use.
        best: best top-1 accuracy so far (fraction), and which weights reached it ("weights" or "average").

    Returns:
        Whether the file was written. No error is raised, so that the error that ends the run (such as a full disk) is
        shown.
    """
    content: dict[str, Any] = {"status": status, "step": step, "reason": redact(reason)}
    if best is not None:
        content["best"], content["best_of"] = best
    if nodes:
        content["nodes"] = list(nodes)
    text = (json.dumps(content) + "\n").encode()
    temporary = temporary_name(run / STATUS_NAME)  # ranks of several hosts may write at the same time
    try:
        if not run.is_dir():
            return False
        temporary.write_bytes(text)
        os.replace(temporary, run / STATUS_NAME)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        return _overwrite(run / STATUS_NAME, text)
    return True


def _overwrite(path: Path, text: bytes) -> bool:
    """Overwrite an existing file in place, which succeeds on a full disk, because its block is already allocated."""
    try:
        handle = open_regular(path, os.O_WRONLY)
    except OSError:
        return False
    try:
        if os.pwrite(handle, text, 0) < len(text):
            return False
        os.ftruncate(handle, len(text))
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


def read_status(run: Path) -> Status | None:
    """Return the status in RUN/status; None if the file is missing or invalid."""
    content = read_content(run)
    return None if content is None else content.status


def read_content(run: Path) -> StatusContent | None:
    """Return the content of RUN/status; None if the file is missing or invalid."""
    try:
        return parse_json(read_regular(run / STATUS_NAME, limit=_LIMIT), _SCHEMA, limit=_LIMIT)
    except (OSError, ValueError):
        return None

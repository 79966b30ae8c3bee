"""RUN/status: one line that says how a run stands, for schedulers and people."""

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
from launch.run.progress import Fraction, Scored
from shards.errors import UserError
from shards.files.durable import temporary_name
from shards.redact import redact
from shards.schema import Count, parse_json

STATUS_NAME = "status"
Status = Literal["running", "preempted", "stalled", "finished", "failed", "refused"]
"""preempted: saved and left when asked to. stalled: ended by the watchdog. refused: bad input, which another start
would meet again. `launch/slurm/train.sbatch` starts a run again after preempted, and within a budget after stalled,
failed and running (it was killed)."""

EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: try again later

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
    best_of: Scored | None = None


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
    """Replace RUN/status, if there is a run folder.

    Args:
        step: optimiser steps in the newest checkpoint; None = not known yet.
        nodes: hosts that should not be used for the next start.
        best: best top-1 so far (share), and what reached it: "weights" or "average".

    Returns:
        Whether it was written. No error is raised: a full disk may be why the run ends, and that error must be shown.
    """
    content: dict[str, Any] = {"status": status, "step": step, "reason": redact(reason)}
    if best is not None:
        content["best"], content["best_of"] = best
    if nodes:
        content["nodes"] = list(nodes)
    text = (json.dumps(content) + "\n").encode()
    temporary = temporary_name(run / STATUS_NAME)  # ranks of several hosts may write at once
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
    """Overwrite the existing file in place: on a full disk, its block is still allocated."""
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
    """Return the status in RUN/status; None if there is none that can be read."""
    content = read_content(run)
    return None if content is None else content.status


def read_content(run: Path) -> StatusContent | None:
    """Return all of RUN/status; None if it cannot be read."""
    try:
        return parse_json(read_regular(run / STATUS_NAME, limit=_LIMIT), _SCHEMA, limit=_LIMIT)
    except (OSError, ValueError):
        return None

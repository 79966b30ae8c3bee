"""RUN/status: one line that says how a run stands, for schedulers and people."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

STATUS_NAME = "status"
Status = Literal["running", "preempted", "stalled", "finished", "failed", "refused"]
"""preempted: saved and left when asked to. stalled: ended by the watchdog. refused: bad input, which another start
would meet again. `launch/slurm/train.sbatch` starts a run again after preempted, and within a budget after stalled,
failed and running (it was killed)."""


def write_status(
    run: Path, status: Status, *, step: int | None = None, reason: str = "", nodes: Sequence[str] = ()
) -> None:
    """Replace RUN/status, if there is a run folder.

    Args:
        step: optimiser steps in the newest checkpoint; None = not known yet.
        nodes: hosts that should not be used for the next start.
    """
    if not run.is_dir():
        return
    content: dict[str, Any] = {"status": status, "step": step, "reason": reason}
    if nodes:
        content["nodes"] = list(nodes)
    # Ranks of several hosts may write at once: process numbers alone are not unique.
    temporary = run / f".{STATUS_NAME}.{os.uname().nodename}.{os.getpid()}"
    try:
        temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
        os.replace(temporary, run / STATUS_NAME)
    except OSError:
        # A full disk may be the very reason for the end, which must not be hidden by it.
        temporary.unlink(missing_ok=True)


def read_status(run: Path) -> Status | None:
    """What RUN/status says; None where nothing readable is there."""
    try:
        status: Status = json.loads((run / STATUS_NAME).read_text(encoding="utf-8"))["status"]
        return status
    except (OSError, ValueError, KeyError):
        return None

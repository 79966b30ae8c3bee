"""RUN/status: one line that says how a run stands, for schedulers and people."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Literal

STATUS_NAME = "status"
Status = Literal["running", "preempted", "finished", "failed"]


def write_status(run: Path, status: Status, *, step: int | None = None, reason: str = "") -> None:
    """Replace RUN/status, if there is a run folder.

    Args:
        step: optimiser steps in the newest checkpoint; None = not known yet.
    """
    if not run.is_dir():
        return
    temporary = run / f".{STATUS_NAME}.{os.getpid()}"
    try:
        temporary.write_text(json.dumps({"status": status, "step": step, "reason": reason}) + "\n", encoding="utf-8")
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

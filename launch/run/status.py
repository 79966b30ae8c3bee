"""RUN/status: a line of JSON with the status of a run, for schedulers and users."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from launch.run.files import open_regular, read_regular
from launch.run.progress import Fraction, WeightsKind
from shards.errors import UserError
from shards.files.durable import temporary_name
from shards.redact import redact
from shards.schema import Count, Finite, parse_json

STATUS_NAME = "status"
Status = Literal["running", "preempted", "stalled", "finished", "failed", "refused"]
"""preempted: stopped on request, after a checkpoint was saved. stalled: ended by the watchdog. refused: invalid input,
with which another start would fail too. `launch/slurm/train.sbatch` restarts a run that was preempted, and a limited
number of times one that is stalled, failed or running (it was killed)."""

EXIT_STATUS = 75  # exit status of a preempted run: EX_TEMPFAIL of sysexits.h, "try again later"

RENEW_SECONDS = 10.0
"""Interval at which a running run renews RUN/status. Content that is a minute older belongs to a run that has died."""
STOP_SECONDS = 2.0
BEFORE_NAME = "status-before"
"""Name to which `launch/slurm/train.sbatch` renames the status of the previous start."""

RESUME_HINT = "correct this, then start the run again: it resumes"

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
    """Step of the newest checkpoint; None: not known yet."""
    reason: str
    time: Finite = 0.0
    """Unix time of this content. While a run is running, it is renewed every `RENEW_SECONDS`."""
    at_step: Count | None = None
    """Optimizer steps done at `at_time`; None: not known, because no start has trained since the run was saved."""
    at_time: Finite | None = None
    """Unix time of the last sign of life of the training; later starts that fail before their training keep it."""
    host: str | None = None
    """Host and process of rank 0, while it is running."""
    pid: Count | None = None
    nodes: list[str] | None = None
    best: Fraction | None = None
    best_of: WeightsKind | None = None

    @property
    def training(self) -> tuple[int, float] | None:
        """Optimizer steps done by the last start that trained, and when; None: not known."""
        return None if self.at_step is None or self.at_time is None else (self.at_step, self.at_time)

    @property
    def interrupted(self) -> bool:
        """Whether the start that wrote this ended without saving: it was killed, it hung, or it failed."""
        return self.status not in ("finished", "preempted")


_SCHEMA = TypeAdapter(StatusContent)


def write_status(
    run: Path,
    status: Status,
    *,
    step: int | None = None,
    reason: str = "",
    nodes: Sequence[str] = (),
    best: tuple[float, str] | None = None,
    at: tuple[int, float] | None = None,
) -> bool:
    """Replace RUN/status, if the run folder exists.

    Args:
        step: step of the newest checkpoint; None: not known yet.
        nodes: hosts that the next start should not use.
        best: best top-1 accuracy so far (fraction), and which weights reached it ("weights" or "average").
        at: optimizer steps done, and the Unix time of this. None: those of the present content are kept, unless the
            run has been saved.

    Returns:
        Whether the file was written. No error is raised, so that the error that ends the run (such as a full disk) is
        shown.
    """
    content: dict[str, Any] = {"status": status, "step": step, "reason": redact(reason), "time": round(time.time(), 3)}
    if at is None and status not in ("finished", "preempted"):
        present = read_content(run)
        at = None if present is None else present.training
    if at is not None:
        content["at_step"], content["at_time"] = at
    if status == "running":
        content |= {"host": socket.gethostname(), "pid": os.getpid()}
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


class StatusRenewal:
    """Renews RUN/status in a background thread while the run is running. A context manager.

    A thread, because shared storage may hang. It writes nothing while the status is not "running", which may have been
    written by the watchdog of another rank.

    Args:
        renew: writes the status "running" with the current step; it may be replaced.
    """

    def __init__(self, run: Path, renew: Callable[[], object], *, interval: float = RENEW_SECONDS) -> None:
        self._run, self.renew, self._interval = run, renew, interval
        self._ends, self._writing = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._loop, name="status", daemon=True)

    def __enter__(self) -> StatusRenewal:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Write nothing more. Waits for a write in progress, but not for ever, because the storage may hang."""
        self._ends.set()
        if self._writing.acquire(timeout=STOP_SECONDS):
            self._writing.release()

    def _loop(self) -> None:
        while not self._ends.wait(self._interval):
            self.renew_if_running()

    def renew_if_running(self) -> None:
        """Renew RUN/status now, unless its status is another one."""
        with self._writing:
            if not self._ends.is_set() and read_status(self._run) in ("running", None):
                self.renew()


def read_previous(run: Path) -> StatusContent | None:
    """Return the status that the previous start left; None if there is none."""
    return read_content(run) or read_content(run, BEFORE_NAME)


def read_status(run: Path) -> Status | None:
    """Return the status in RUN/status; None if the file is missing or invalid."""
    content = read_content(run)
    return None if content is None else content.status


def read_content(run: Path, name: str = STATUS_NAME) -> StatusContent | None:
    """Return the content of RUN/status; None if the file is missing or invalid."""
    try:
        return parse_json(read_regular(run / name, limit=_LIMIT), _SCHEMA, limit=_LIMIT)
    except (OSError, ValueError):
        return None

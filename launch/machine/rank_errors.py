"""Errors of one of several ranks: report each once, through the launcher if it prints errors itself.

torch's launcher (torchrun, `accelerate launch --multi_gpu`, `pipeline train`) ends the other ranks when one fails, and
then prints a summary with the content of the failed rank's error file. An error that all ranks have in common is
reported by rank 0 only: the others wait until the launcher ends them, and report it if this does not happen.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from shards.errors import UserError, report
from shards.redact import printable, redacted_traceback

# Longer than a launcher takes to notice the end of rank 0 and to end the others: torch's looks ten times per second.
RANK0_SECONDS = 3.0


def is_rank0() -> bool:
    """Return whether this process is rank 0, also before the ranks are connected."""
    return os.environ.get("RANK", "0") == "0"


def has_other_ranks() -> bool:
    """Return whether a launcher has started other ranks too."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "1")


def follows_rank0() -> bool:
    """Return whether this is one of several ranks, other than rank 0."""
    return has_other_ranks() and not is_rank0()


def wait_for_end() -> None:
    """Wait until the launcher ends this rank, because another has failed; return if it does not."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(RANK0_SECONDS)


def report_user_error(error: UserError) -> None:
    """Print an error in one line, or pass it to the launcher, which prints it."""
    failed_at = time.time()
    if follows_rank0():
        wait_for_end()
    if not _write_error_file(f"{_prefix()}error: {printable(error)}", failed_at):
        report(error, prefix=_prefix())


def report_unexpected(error: Exception, ended: Callable[[], bool]) -> None:
    """Print the traceback of an error that no check has foreseen, and name it in the launcher's summary.

    Every rank waits first: if another rank has failed, this error is probably that its connection was closed.

    Args:
        ended: returns whether the launcher has already asked this rank to end.
    """
    failed_at = time.time()
    if has_other_ranks():
        if ended():
            os._exit(128 + signal.SIGTERM)
        wait_for_end()
    print(redacted_traceback(error), end="", file=sys.stderr, flush=True)
    _write_error_file(printable(f"{_prefix()}{type(error).__name__}: {error}"), failed_at)


def _prefix() -> str:
    return "" if is_rank0() else f"rank {os.environ['RANK']}: "


def _write_error_file(line: str, failed_at: float) -> bool:
    """Write the line to the error file of torch's launcher; return whether the launcher will print it.

    The format is that of `torch.distributed.elastic.multiprocessing.errors`.
    """
    path, restarts = os.environ.get("TORCHELASTIC_ERROR_FILE"), os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    # The launcher prints only the errors of the last attempt.
    if not path or restarts != os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"):
        return False
    extra = {"py_callstack": line, "timestamp": str(int(failed_at))}
    with contextlib.suppress(OSError):
        Path(path).write_text(json.dumps({"message": {"message": line, "extraInfo": extra}}), encoding="utf-8")
        return True
    return False

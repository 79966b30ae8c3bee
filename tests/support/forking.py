"""Servers that fork test processes: their answers, and the end of a forked process."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn, TextIO


def open_answers() -> TextIO:
    """Return a file for answers on stdout, and let everything that libraries print to stdout go to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def exit_after(work: Callable[[], int | None]) -> NoReturn:
    """Do the work of a forked process, and exit with its return value, without the handlers of the parent process."""
    status = 1
    try:
        status = work() or 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(bool(end.code))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

"""Starts ranks on a simulated host, forked from a process that has imported their modules.

    python -m tests.soak.fork_server

A fresh start of a rank takes five seconds of CPU time, most of it for imports, which would be most of the time of a
soak on few cores. The server reads one start per line from stdin, {"arguments": [...], "environment": {...}, "log":
FILE}, and answers {"pid": P}; when a rank has ended, it prints {"pid": P, "status": S} (negative: a signal). The ranks
are killed if the server ends.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import select
import signal
import sys
import threading
from collections.abc import Mapping
from typing import Any

import tests.soak.rank
from tests.support.forking import exit_after, open_answers

# Libraries that a rank imports when it needs them.
LIBRARIES = (
    *("accelerate", "deepspeed", "torch._dynamo", "torch._functorch.aot_autograd", "matplotlib.pyplot"),
    *("pipeline.decode.dali", "tests.support.models"),
)
POLL_SECONDS = 0.05
_PR_SET_PDEATHSIG = 1


def main() -> None:
    answers = open_answers()
    for name in LIBRARIES:
        __import__(name)
    assert threading.active_count() == 1, "threads do not survive a fork"
    print(json.dumps({"ready": True}), file=answers, flush=True)
    reader = os.fdopen(os.dup(0), "rb", buffering=0)
    pending = b""
    while True:
        if select.select([reader], [], [], POLL_SECONDS)[0]:
            found = reader.read(1 << 16)
            if not found:
                return
            pending += found
            *lines, pending = pending.split(b"\n")
            for line in lines:
                start = json.loads(line)
                pid = os.fork()
                if pid == 0:
                    exit_after(functools.partial(run, start))
                print(json.dumps({"pid": pid}), file=answers, flush=True)
        while (ended := reap()) is not None:
            print(json.dumps(ended), file=answers, flush=True)


def reap() -> dict[str, int] | None:
    """Return the process id and the exit status of a rank that has ended; None: there is none."""
    try:
        pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return None
    return {"pid": pid, "status": os.waitstatus_to_exitcode(status)} if pid else None


def run(start: Mapping[str, Any]) -> int:
    """Run one rank; return its exit status."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setsid()
    with open(start["log"], "ab") as log, open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ |= start["environment"]
    sys.argv = ["rank.py", *start["arguments"]]
    return tests.soak.rank.main()


if __name__ == "__main__":
    main()

"""Ranks forked from a process that has imported their modules, as torchrun would start them.

    python -m tests.dist.forked MODULE...

Importing torch, accelerate and DeepSpeed takes each process four seconds of a core, which is most of a short test.
Reads launches from its input, one JSON object a line: {"module": M, "arguments": [...], "ranks": N, "port": P,
"environment": {...}, "errors": FILE}. Forks N processes that exit with what M.main() returns, and answers with the list
of their process ids; when one fails it ends all of them; at the end it answers with the list of their statuses
(negative: a signal).
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.support.launching import ROOT, environment, free_port

SECONDS = 200.0


class Launcher:
    """Launches ranks, again and again. A context manager.

    Args:
        folder: for what ranks write on their standard error.
        modules: imported before ranks are forked.
    """

    def __init__(self, folder: Path, *modules: str) -> None:
        self._modules = modules
        self.errors = folder / "errors.txt"
        """What the ranks of the last launch have written on their standard output and error."""
        self.running: list[int] = []
        """Process ids of the ranks whose end nobody has waited for."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.dist.forked", *modules],
            cwd=ROOT,
            env=environment(folder),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # an answer in a buffer would be hidden from select
            start_new_session=True,
        )

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()

    def __call__(self, module: str, *arguments: object, ranks: int = 1, **environment: str) -> str:
        """Call `module.main()` on every rank and wait for all, which must succeed; return their stderr."""
        self.start(module, *arguments, ranks=ranks, **environment)
        statuses = self.join()
        errors = self.errors.read_text(errors="replace")
        assert statuses == [0] * ranks, errors
        return errors

    def start(self, module: str, *arguments: object, ranks: int = 1, **environment: str) -> None:
        """Call `module.main()` on every rank. Ranks that are still running are killed."""
        assert module in self._modules, f"{module} is not imported"
        assert self._process.stdin is not None
        self.kill()
        launch = {"module": module, "arguments": list(map(str, arguments)), "ranks": ranks, "port": free_port()}
        launch |= {"environment": environment, "errors": str(self.errors)}
        self.errors.write_text("")
        self._process.stdin.write(json.dumps(launch).encode() + b"\n")
        self.running = self._answer()

    def have_ended(self, seconds: float = 0.0) -> bool:
        """Wait for the end of the ranks; whether it has come within so many seconds."""
        return bool(select.select([self._process.stdout], [], [], seconds)[0])

    def join(self, seconds: float = SECONDS) -> list[int]:
        """Wait for the end of the ranks; their statuses. AssertionError if it takes too long."""
        if not self.have_ended(seconds):
            self.kill()
            raise AssertionError(f"no end after {seconds:.0f} s\n{self.errors.read_text(errors='replace')}")
        self.running = []
        return self._answer()

    def kill(self) -> None:
        """Kill the ranks that are running, if any."""
        for pid in self.running:
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.kill(pid, signal.SIGKILL)
        if self.running:
            self._answer()
        self.running = []

    def _answer(self) -> list[int]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the ranks' parent has died"
        return list(json.loads(line))


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    modules = {name: importlib.import_module(name) for name in sys.argv[1:]}
    assert threading.active_count() == 1, "a thread would not be there after forking"
    for line in sys.stdin:
        launch = json.loads(line)
        pids = []
        for rank in range(launch["ranks"]):
            pid = os.fork()
            if pid == 0:
                run(modules[launch["module"]], rank, launch)
            pids.append(pid)
        print(json.dumps(pids), file=answers, flush=True)
        print(json.dumps(wait(pids)), file=answers, flush=True)


def run(module: Any, rank: int, launch: Mapping[str, Any]) -> None:
    """Be a rank, and never return."""
    status = 1
    try:
        with open(launch["errors"], "a") as errors:
            os.dup2(errors.fileno(), 1)
            os.dup2(errors.fileno(), 2)
        own, world = str(rank), str(launch["ranks"])
        os.environ |= {"RANK": own, "LOCAL_RANK": own, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(launch["port"]), **launch["environment"]}
        sys.argv = [module.__file__, *launch["arguments"]]
        status = module.main() or 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(bool(end.code))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(pids: list[int]) -> list[int]:
    """Their statuses, in order of ranks."""
    statuses: dict[int, int] = {}
    while len(statuses) < len(pids):
        pid, status = os.wait()
        statuses[pid] = os.waitstatus_to_exitcode(status)
        if statuses[pid]:
            for other in set(pids) - statuses.keys():
                os.kill(other, signal.SIGKILL)
    return [statuses[pid] for pid in pids]


if __name__ == "__main__":
    main()

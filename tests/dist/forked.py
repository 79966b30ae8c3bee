"""Ranks with the environment of torchrun, forked from a process that has already imported their modules.

    python -m tests.dist.forked MODULE...

Importing torch, accelerate and DeepSpeed takes four seconds of CPU time per process, most of the time of a short test.
The parent process reads one launch per line from stdin, as a JSON object: {"module": M, "arguments": [...], "ranks": N,
"port": P, "environment": {...}, "errors": FILE}. It forks N processes, which exit with the return value of M.main(),
and answers with the list of their process ids. When one of them fails, it kills the others. When all have ended, it
answers with the list of their exit statuses (negative: a signal).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.support.forking import exit_after, open_answers
from tests.support.launching import ROOT, environment, free_port

SECONDS = 200.0


class Launcher:
    """Context manager that launches ranks, any number of times.

    Args:
        folder: folder for the output of the ranks.
        modules: modules to import before forking.
    """

    def __init__(self, folder: Path, *modules: str) -> None:
        self._modules = modules
        self.errors = folder / "errors.txt"
        """File of the stdout and stderr of the last launch's ranks."""
        self.running: list[int] = []
        """Process ids of the ranks that have not been waited for."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.dist.forked", *modules],
            cwd=ROOT,
            env=environment(folder),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # select would not see a buffered answer
            start_new_session=True,
        )

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()

    def __call__(self, module: str, *arguments: object, ranks: int = 1, **environment: str) -> str:
        """Call `module.main()` on every rank, and return their output. All ranks must succeed."""
        self.start(module, *arguments, ranks=ranks, **environment)
        statuses = self.join()
        errors = self.errors.read_text(errors="replace")
        assert statuses == [0] * ranks, errors
        return errors

    def start(self, module: str, *arguments: object, ranks: int = 1, **environment: str) -> None:
        """Kill the ranks that are still running, and call `module.main()` on new ones."""
        assert module in self._modules, f"{module} is not imported"
        assert self._process.stdin is not None
        self.kill()
        launch = {"module": module, "arguments": list(map(str, arguments)), "ranks": ranks, "port": free_port()}
        launch |= {"environment": environment, "errors": str(self.errors)}
        self.errors.write_text("")
        self._process.stdin.write(json.dumps(launch).encode() + b"\n")
        self.running = self._answer()

    def have_ended(self, seconds: float = 0.0) -> bool:
        """Wait at most `seconds` for the ranks to end, and return whether they have."""
        return bool(select.select([self._process.stdout], [], [], seconds)[0])

    def join(self, seconds: float = SECONDS) -> list[int]:
        """Wait for the ranks to end, and return their exit statuses. Raise AssertionError after `seconds`."""
        if not self.have_ended(seconds):
            self.kill()
            errors = self.errors.read_text(errors="replace")
            raise AssertionError(f"the ranks have not ended after {seconds:.0f} s\n{errors}")
        self.running = []
        return self._answer()

    def kill(self) -> None:
        """Kill the running ranks, if any."""
        for pid in self.running:
            with contextlib.suppress(ProcessLookupError):  # it has already ended
                os.kill(pid, signal.SIGKILL)
        if self.running:
            self._answer()
        self.running = []

    def _answer(self) -> list[int]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the parent process of the ranks has died"
        return list(json.loads(line))


def main() -> None:
    answers = open_answers()
    modules = {name: importlib.import_module(name) for name in sys.argv[1:]}
    assert threading.active_count() == 1, "threads do not survive a fork"
    for line in sys.stdin:
        launch = json.loads(line)
        pids = []
        for rank in range(launch["ranks"]):
            pid = os.fork()
            if pid == 0:
                exit_after(functools.partial(run, modules[launch["module"]], rank, launch))
            pids.append(pid)
        print(json.dumps(pids), file=answers, flush=True)
        print(json.dumps(wait(pids)), file=answers, flush=True)


def run(module: Any, rank: int, launch: Mapping[str, Any]) -> int | None:
    """Run one rank; return its exit status."""
    with open(launch["errors"], "a") as errors:
        os.dup2(errors.fileno(), 1)
        os.dup2(errors.fileno(), 2)
    own, world = str(rank), str(launch["ranks"])
    os.environ |= {"RANK": own, "LOCAL_RANK": own, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(launch["port"]), **launch["environment"]}
    sys.argv = [module.__file__, *launch["arguments"]]
    return module.main()  # type: ignore[no-any-return]


def wait(pids: list[int]) -> list[int]:
    """Wait for the processes, and return their exit statuses. When one fails, kill the others."""
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

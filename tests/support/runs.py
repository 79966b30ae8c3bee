"""Start training runs as separate processes, wait for a step, read their files, and end them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any, Protocol

import pytest

from tests.support.launching import LAUNCHER, ROOT, TRAIN, environment, free_port, lines

OPTIONS = ("--recipe", "launch/recipes/digits.toml", "--size", "32", "--log-every", "1", "--epochs", "3")
STARTED: list[subprocess.Popen[str]] = []
"""Started processes, which the fixture `_no_run_outlives_its_test` of tests/dist ends."""


def start(
    tmp_path: Path, *args: str | Path, ranks: int = 1, script: tuple[str, ...] = (TRAIN,)
) -> subprocess.Popen[str]:
    """Start a run in a separate process group: one Python process, or several with `accelerate launch`."""
    topology = ["--multi_gpu", "--num_processes", str(ranks), "--main_process_port", str(free_port())]
    command = [*LAUNCHER, *topology] if ranks > 1 else [sys.executable]
    return spawn(tmp_path, *command, *script, *OPTIONS, *args)


def spawn(tmp_path: Path, *command: str | Path) -> subprocess.Popen[str]:
    """Start a command in a separate process group."""
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        env=environment(tmp_path),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    STARTED.append(process)
    return process


class Process(Protocol):
    """A running process with an exit status and, possibly, a stderr pipe."""

    stderr: IO[str] | None

    def poll(self) -> int | None: ...


def wait_for_step(run: Path, step: int, process: Process) -> None:
    """Wait until the run's metrics have a line for `step` or a later step."""
    for _ in range(1200):
        if (run / "metrics.jsonl").exists() and any(line["step"] >= step for line in lines(run, "train")):
            return
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.1)
    pytest.fail(f"no step {step} within two minutes")


def status(run: Path) -> dict[str, Any]:
    return json.loads((run / "status").read_text())


def ranks_of(run: Path) -> list[int]:
    """Return the ids of processes whose command line contains the path of this run."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                text = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(run).encode() in text:
                found.append(int(entry.name))
    return found


def process_of_rank(run: Path, rank: int) -> int:
    """Return the id of a rank of a run that several processes train."""
    (found,) = (pid for pid in ranks_of(run) if f"\0RANK={rank}\0".encode() in _environment(pid))
    return found


def _environment(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # the process has ended
        return b""


def kill_everything(process: subprocess.Popen[str]) -> None:
    for pid in _descendants(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def _descendants(pid: int) -> list[int]:
    """Return `pid` and all its descendants."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{parent}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
    return found

"""Run training commands as a user does, in separate processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = (sys.executable, "-m", "accelerate.commands.launch")
TRAIN = "launch/train.py"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


STRIPPED = ("ACCELERATE_", "DS_", "RANK", "WORLD_", "LOCAL_", "MASTER_", "FAT_DATA", "SLURM_")


def python_path() -> str:
    """Return a PYTHONPATH with this project first."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def environment(tmp_path: Path, **extra: str) -> dict[str, str]:
    """Return the environment without variables of launchers and users, and without GPUs (except in tests/gpu)."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(STRIPPED)}
    hidden = {} if "tests/gpu" in os.environ.get("PYTEST_CURRENT_TEST", "") else {"CUDA_VISIBLE_DEVICES": ""}
    return kept | {"HF_HOME": str(tmp_path / "empty-hf-home"), "PYTHONPATH": python_path()} | hidden | extra


def accelerate(
    tmp_path: Path, *args: str | Path, ranks: int = 1, timeout: float = 280
) -> subprocess.CompletedProcess[str]:
    """Run `accelerate launch [--multi_gpu --num_processes N] launch/train.py ARGS`."""
    topology = (
        [] if ranks == 1 else ["--multi_gpu", "--num_processes", str(ranks), "--main_process_port", str(free_port())]
    )
    return run(tmp_path, *LAUNCHER, *topology, TRAIN, *args, timeout=timeout)


def python(tmp_path: Path, *args: str | Path, timeout: float = 280, **env: str) -> subprocess.CompletedProcess[str]:
    """Run `python ARGS`."""
    return run(tmp_path, sys.executable, *args, timeout=timeout, **env)


def run(tmp_path: Path, *command: str | Path, timeout: float = 280, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the project's folder, in `environment`."""
    return subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env=environment(tmp_path, **env),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def lines(run: Path, kind: str) -> list[dict[str, Any]]:
    """Return the lines of one kind in a run's metrics."""
    text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    return [line for line in map(json.loads, text.splitlines()) if line["kind"] == kind]

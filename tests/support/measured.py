"""Measure the memory of Python code in a new process."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_HEAD = """
def _peak():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))) * 1024
def measure():
    global _before
    open("/proc/self/clear_refs", "w").write("5")
    _before = _peak()
def grown():
    return _peak() - _before
"""


def run_measured(code: str, timeout: float = 300) -> str:
    """Run Python code in a new process; return its output.

    The code may call `measure()`, and later `grown()`, which returns the maximum growth of its resident memory in bytes
    since `measure()`.
    """
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", _HEAD + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=env,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout
